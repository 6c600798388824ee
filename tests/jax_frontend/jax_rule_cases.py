"""Functions whose rules compute the gradient in ways of their own, and losses of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax_cases import N, array, mean_square

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


@with_rule(
    lambda x, w, g: (g @ w.T, jnp.concatenate([x.T @ g[:, :2], x.T @ g[:, 2:]], axis=1)),
)
def halves(x, w):
    return jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], axis=1)


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


def in_halves(p, x, own):
    return mean_square(own(halves)(x, p["w"]))


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


HALVES = {"w": array(4, 4)}
SOLVED = {"v": array(4, 5), "a": array(5), "w": array(5, 4), "b": array(4)}
LAYERS = {
    "mlp": [array(4, 5), array(5), array(5, 3), array(3)],
    "mapped": [array(3, 4), array(4)],
    "rows": array(4, 4),
    "scanned": [array(2, 4, 4), array(2, 4)],
    "tied": array(4, 4, seed=1),
}
LOSSES = {"first": array(4, 4), "by_rows": array(4, 6), "saving": array(4, 3)}
