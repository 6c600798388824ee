"""Parameters of 16 bits: short steps add up as in float32, and the rounded weights come out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import array, mean_square

import singd_jax
from singd_core.optimizer import Fallback
from singd_core.rounding import Rounding

# Short steps are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.*the rate is the size of a step")

BATCH = 0.3 * array(16, 12)


def start(dtype=jnp.bfloat16):
    params = {"v": array(12, 20), "a": array(20), "w": array(20, 6), "scale": array(20)}
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(dtype), params)


def loss(p, x):
    x = x.astype(p["v"].dtype)
    h = jnp.tanh(x @ p["v"] + p["a"]) * p["scale"]
    return mean_square((h @ p["w"]).astype(jnp.float32))


LAYERS = singd_jax.find_layers(loss)(start(), BATCH)


@functools.cache
def trained(dtype="bfloat16", steps=8, rate=4e-4, again=False, **given):
    """The parameters and the state; `again` after a resumption from a file in the middle."""
    fallback = Fallback(lr=rate / 10)
    tx = singd_jax.singd(rate, layers=LAYERS, warmup=0, fallback=fallback, **given)

    @jax.jit
    def step(params, state):
        _, grads = singd_jax.value_and_grad(loss)(params, state, BATCH)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = start(dtype)
    state = tx.init(params)
    for i in range(steps):
        if again and i == steps // 2:
            state = singd_jax.unflatten(tx.init(params), singd_jax.flatten(state))
        params, state = step(params, state)
    return params, state


def changes(params):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start()), strict=True)
    return np.concatenate([np.ravel(np.float32(a) - np.float32(b)) for a, b in pairs])


@pytest.mark.slow
def test_steps_below_half_a_unit_add_up():
    expected = changes(trained("float32")[0])
    shares = {}
    for mode in ("nearest", "stochastic", "kahan"):
        params, _ = trained(rounding=mode)
        assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
        shares[mode] = float(changes(params) @ expected / (expected @ expected))
    assert shares["nearest"] < 0.5, shares
    assert all(abs(shares[mode] - 1.0) < 0.15 for mode in ("stochastic", "kahan")), shares


def test_a_weight_with_its_compensation_is_nearly_that_of_float32():
    expected, (params, state) = changes(trained("float32")[0]), trained(rounding="kahan")
    assert jax.tree.structure(state.lost) == jax.tree.structure(params)
    cost = np.concatenate([np.ravel(np.float32(a)) for a in jax.tree.leaves(state.lost)])
    alone = changes(params)
    errors = [np.linalg.norm(x - expected) for x in (alone + cost, alone)]
    assert 5.0 * errors[0] < errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_a_run_that_is_resumed_takes_the_same_bits(mode):
    found, expected = trained(rounding=mode, again=True), trained(rounding=mode)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_another_seed_takes_other_bits():
    assert not np.array_equal(
        changes(trained(rounding="stochastic", seed=1)[0]),
        changes(trained(rounding="stochastic")[0]),
    )


def test_parameters_of_float32_keep_nothing():
    assert trained("float32", rounding="kahan")[1].lost is None
    for a, b in zip(
        *(jax.tree.leaves(trained("float32", **g)[0]) for g in ({}, {"rounding": "kahan"})),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_preconditioner_alone_changes_no_weights():
    with pytest.raises(ValueError, match='choose "stochastic" or "nearest"'):
        singd_jax.scale_by_singd(layers=LAYERS, rounding="kahan")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_momenta_have_the_dtype_that_was_chosen(dtype):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    params, state = trained(dtype, momentum_dtype=other)
    momenta = [m for own in state.core.layers.values() for m in own.momenta]
    assert {m.dtype for m in momenta} == {jnp.dtype(other)}
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    found, expected = changes(params), changes(trained(dtype)[0])
    assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)


def test_a_compensated_sum_does_not_cast_there_and_back():
    """XLA leaves out such pairs on a GPU, and the cost would be zero."""
    rounding = Rounding.of("kahan", 0, 0, "a", {"weight": "bfloat16"})
    x, cost = jnp.ones(3), jnp.zeros(3, jnp.bfloat16)
    stored = lambda x, cost: rounding.stored(x, "weight", cost=cost)  # noqa: E731
    casts = re.findall(r"new_dtype=bfloat16", str(jax.make_jaxpr(stored)(x, cost)))
    assert len(casts) == 1  # of the cost
