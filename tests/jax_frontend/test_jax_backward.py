"""Rows from the backward pass that a function with a `custom_vjp` brings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_cases import X, array, mean_square
from jax_rule_cases import (
    HALVES,
    LAYERS,
    LOSSES,
    SOLVED,
    Y,
    by_entries,
    in_halves,
    layers,
    linear,
    losses,
    rounded,
    same,
    solved,
    with_rule,
)

import singd_jax


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "params"),
    [(layers, LAYERS), (losses, LOSSES), (solved, SOLVED), (in_halves, HALVES)],
)
def test_the_curvature_is_that_of_the_function_without_its_rule(loss, params):
    found = []
    for own in (lambda f: f, same):
        function = functools.partial(loss, own=own)
        own_layers = singd_jax.find_layers(function)(params, X)
        assert not own_layers.others
        assert singd_jax.check(function, own_layers)(params, X).keys() == set(own_layers)
        state = singd_jax.singd(layers=own_layers, T=1).init(params)
        measured = jax.jit(singd_jax.value_and_curvature(function, own_layers))
        found.append((set(own_layers), measured(params, state, X)))
    (names, got), (own_names, expected) = found
    assert names == own_names
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
