"""Rows from the backward pass that a function with a `custom_vjp` brings."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_cases import N, X, array, mean_square

import singd_jax

Y = jnp.arange(N) % 6


def with_rule(backward):
    """A function with a backward pass of its own, which gets its arguments and the gradient."""

    def decorate(f):
        function = jax.custom_vjp(f)
        function.defvjp(lambda *args: (f(*args), args), lambda args, g: backward(*args, g))
        return function

    return decorate


def same(f):
    """The function that its rule is for."""
    return f.fun


# ---- functions with rules that compute the gradient in ways of their own ------------------------


@with_rule(
    lambda x, w, b, g: (
        g @ w.T,
        jnp.einsum("...i,...o->io", x, g.astype(jnp.float32)),
        g.reshape(-1, g.shape[-1]).sum(0),
    )
)
def linear(x, w, b):
    return x @ w + b


def mlp_backward(x, w1, b1, w2, b2, g):
    h = jnp.tanh(x @ w1 + b1)
    d = (g @ w2.T) * (1 - h * h)
    return d @ w1.T, x.T @ d, d.sum(0), h.T @ g, g.sum(0)


@with_rule(mlp_backward)
def mlp(x, w1, b1, w2, b2):
    return jnp.tanh(x @ w1 + b1) @ w2 + b2


def twice_backward(x, w, g):
    h = jnp.tanh(x @ w)
    d = (g @ w.T) * (1 - h**2)
    return d @ w.T, h.T @ g + x.T @ d


@with_rule(twice_backward)
def twice(x, w):
    return jnp.tanh(x @ w) @ w


def in_a_while_loop(x, w, g):
    def more(state):
        return state[0] < len(x)

    def step(state):
        i, total = state
        return i + 1, lax.cond(i >= 0, lambda a: a + x[i][:, None] @ g[i][None], jnp.copy, total)

    return g @ w.T, lax.while_loop(more, step, (0, jnp.zeros_like(w)))[1]


@with_rule(in_a_while_loop)
def row_by_row(x, w):
    return x @ w


@with_rule(lambda x, w, b, g: (w @ g, jnp.outer(x, g), g))
def of_one(x, w, b):
    return x @ w + b


@with_rule(lambda w, g: (2.0 * g,))
def rounded(w):
    return jnp.round(8.0 * w) / 8.0


def entropy(x, w, y):
    logits = jax.nn.log_softmax(x @ w)
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()


def chunks_of_rows(x, w, y, g):
    def step(total, own):
        x, y = own
        d = jax.nn.softmax(x @ w) - jax.nn.one_hot(y, w.shape[1])
        return total + x.T @ d, d @ w.T

    xs = x.reshape(3, -1, x.shape[1]), y.reshape(3, -1)
    total, dx = lax.scan(step, jnp.zeros_like(w), xs)
    return g / len(x) * dx.reshape(x.shape), total * (g / len(x)), None


def chunks_of_entries(x, w, y, g):
    normal = jax.nn.logsumexp(x @ w, axis=1, keepdims=True)

    def step(dx, own):
        w, i = own
        one_hot = y[:, None] == i * 3 + jnp.arange(3)
        d = (jnp.exp(x @ w - normal) - one_hot) * (g / len(x))
        return dx + d @ w.T, x.T @ d

    parts = w.reshape(w.shape[0], 2, 3).swapaxes(0, 1)
    dx, found = lax.scan(step, jnp.zeros_like(x), (parts, jnp.arange(2)))
    return dx, found.swapaxes(0, 1).reshape(w.shape), None


by_rows = with_rule(chunks_of_rows)(entropy)
by_entries = with_rule(chunks_of_entries)(entropy)


@jax.custom_vjp
def saving(x, w):
    return mean_square(x @ w)


def saving_forward(x, w):
    value, d = jax.value_and_grad(mean_square)(x @ w)
    return value, (x, w, d)


saving.defvjp(saving_forward, lambda kept, g: (g * kept[2] @ kept[1].T, g * (kept[0].T @ kept[2])))

# ---- losses, which take functions with their rules, or without ----------------------------------


def layers(p, x, own):
    x = own(mlp)(x, *p["mlp"])
    x = jax.vmap(lambda x: own(of_one)(x, *p["mapped"]))(x)
    x = own(row_by_row)(jnp.tanh(x), p["rows"].T * 3.0)

    @jax.checkpoint
    def step(x, layer):
        return jnp.tanh(own(linear)(x, *layer)), None

    x, _ = lax.scan(step, x, p["scanned"])
    return mean_square(own(twice)(x, p["tied"]))


def losses(p, x, own):
    x = jnp.tanh(x @ p["first"])
    return own(by_rows)(x, p["by_rows"], Y) + 3.0 * own(saving)(x, p["saving"])


def solved(p, x, own):
    """Steps of an equation, as diffrax takes them by default, or one after the other."""

    def step(state):
        i, y = state
        return i + 1, y + 0.1 * (jnp.tanh(y @ p["v"] + p["a"]) @ p["w"] + p["b"])

    if own is same:
        for i in range(3):
            _, x = step((i, x))
        return mean_square(x)

    def from_one(y):
        loop = eqx.internal.while_loop
        start = jnp.array(0), y
        return loop(lambda s: s[0] < 3, step, start, max_steps=4, kind="checkpointed")[1]

    return mean_square(jax.vmap(from_one)(x))


SOLVED = {"v": array(4, 5), "a": array(5), "w": array(5, 4), "b": array(4)}
LAYERS = {
    "mlp": [array(4, 5), array(5), array(5, 3), array(3)],
    "mapped": [array(3, 4), array(4)],
    "rows": array(4, 4),
    "scanned": [array(2, 4, 4), array(2, 4)],
    "tied": array(4, 4, seed=1),
}
LOSSES = {"first": array(4, 4), "by_rows": array(4, 6), "saving": array(4, 3)}


@pytest.mark.parametrize(("loss", "params"), [(layers, LAYERS), (losses, LOSSES), (solved, SOLVED)])
def test_the_curvature_is_that_of_the_function_without_its_rule(loss, params):
    found = []
    for own in (lambda f: f, same):
        function = functools.partial(loss, own=own)
        own_layers = singd_jax.find_layers(function)(params, X)
        assert not own_layers.others
        state = singd_jax.singd(layers=own_layers, T=1).init(params)
        measured = jax.jit(singd_jax.value_and_curvature(function, own_layers))
        found.append((set(own_layers), measured(params, state, X)))
    (names, got), (own_names, expected) = found
    assert names == own_names
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- what a rule may do besides -----------------------------------------------------------------


def forward_gradient(x, w):
    value, (dx, dw) = jax.value_and_grad(lambda x, w: mean_square(x @ w), (0, 1))(x, w)
    return value, (dx, dw)


@jax.custom_vjp
def before(x, w):
    return mean_square(x @ w)


before.defvjp(forward_gradient, lambda kept, g: (g * kept[0], g * kept[1]))


def product(of_w, of_g=lambda g: g):
    """A product with a rule that changes the gradients of its output or of its weight."""

    def backward(x, w, g):
        g = of_g(g)
        return g @ w.T, of_w(x, g)

    return with_rule(backward)(lambda x, w: x @ w)


def last_of_a_scan(x, g):
    xs = x[:, :, None], g[:, None, :]
    return lax.scan(lambda _, own: (own[0] @ own[1], None), jnp.zeros((4, 3)), xs)[0]


def two_sums_of_a_scan(x, g):
    def step(totals, own):
        x, g = own
        return (totals[0] + x.T @ g, totals[1] + x.T @ g), None

    zeros = jnp.zeros((4, 3))
    xs = x.reshape(3, 2, -1), g.reshape(3, 2, -1)
    (a, b), _ = lax.scan(step, (zeros, zeros), xs)
    return a * g.sum() + b


plain = jax.jit(with_rule(lambda x, w, g: (g @ w.T, x.T @ g))(lambda x, w: x @ w))


def at_data_and_at_what_depends_on_parameters(x, w):
    return plain(jnp.pad(jnp.tanh(plain(x, w)), ((0, 0), (0, 1))), w)


def clip(g):
    return jnp.clip(g, -0.01, 0.01)


def of_unit_norm(x, g):
    return (x.T @ g) / jnp.linalg.norm(x.T @ g)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (product(lambda x, g: x.T @ g, clip), None),
        (product(of_unit_norm), None),
        (product(lambda x, g: jax.jit(jnp.multiply)(3.0 * (x.T @ g), -g.sum()) / 2.0), None),
        (product(lambda x, g: jnp.zeros((4, 3)) - x.T @ g), None),
        (at_data_and_at_what_depends_on_parameters, None),
        (lambda x, w: x @ rounded(w), None),
        (product(lambda x, g: clip(x.T @ g)), "by `min`"),
        (product(lambda x, g: jnp.zeros((4, 3)) + x.T @ g[:, :1]), "with what is repeated"),
        (product(lambda x, g: (x.T @ g) * jnp.arange(3.0)), "by `mul`"),
        (product(two_sums_of_a_scan), "by numbers that differ"),
        (product(lambda x, g: jnp.zeros((4, 3))), "no gradient of the loss reaches it"),
        (product(lambda x, g: (x.T @ g) @ (g.T @ g)), "by a product of two"),
        (product(last_of_a_scan), "by a `scan` that is no sum"),
        (before, "by its forward pass"),
    ],
)
def test_rows_are_those_of_the_rule_or_the_table_says_why_there_are_none(function, said):
    def loss(p, x):
        return mean_square(jnp.atleast_2d(function(x, p["w"])))

    params = {"w": array(4, 3)}
    found = singd_jax.find_layers(loss)(params, X)
    assert (said or "") in str(found)
    assert said or not found["w"].elsewhere
    gaps = singd_jax.check(loss, found)(params, X)
    assert said or gaps["w"] < 1e-5


def test_each_chunk_of_a_head_is_a_layer_if_the_rule_puts_them_together():
    params = {"w": array(4, 6)}
    found = singd_jax.find_layers(lambda p, x: by_entries(x, p["w"], Y))(params, X)
    assert found["w"].shape == ((2,), 3, 4)
    singd_jax.check(lambda p, x: by_entries(x, p["w"], Y), found)(params, X)


def scaled_after_the_loop(x, w, b, g):
    def step(totals, own):
        x, g = own
        return (totals[0] + x.T @ g, totals[1] + g.sum(0)), None

    xs = x.reshape(3, 2, -1), g.reshape(3, 2, -1)
    (dw, db), _ = lax.scan(step, (jnp.zeros_like(w), jnp.zeros_like(b)), xs)
    return g @ w.T, dw * g.sum(), db


def test_a_bias_whose_gradient_is_scaled_otherwise_is_none():
    function = with_rule(scaled_after_the_loop)(linear.fun)

    def loss(p, x):
        return mean_square(function(x, p["w"], p["b"]))

    params = {"w": array(4, 3), "b": array(3)}
    found = singd_jax.find_layers(loss)(params, X)
    assert found["w"].bias is None
    singd_jax.check(loss, found)(params, X)
