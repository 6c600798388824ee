"""XLA is given the code of one of many equal layers; what that must not change."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import X, array, mean_square

import singd_jax


def start(n: int, dtype: Any = jnp.float32) -> Any:
    """n equal layers, a table of their shape that shows no rows, and n scales."""
    layers = {f"{i}": {"w": array(4, 4, seed=i), "b": array(4, seed=i)} for i in range(n)}
    scales = {f"{i}": 1.0 + 0.1 * array(4, seed=i + 9) for i in range(n)}
    params = {"layers": layers, "scales": scales, "free": array(4, 4, seed=99)}
    return jax.tree.map(lambda a: a.astype(dtype), params)


def loss(p: Any, x: Any) -> Any:
    x = x.astype(p["free"].dtype)
    for name, own in p["layers"].items():
        x = x + jnp.tanh(x @ own["w"] + own["b"]) * p["scales"][name]
    return mean_square((x @ (p["free"] * p["free"])).astype(jnp.float32))


@functools.cache
def layers_of(n: int, dtype: Any = jnp.float32, structures: Any = None) -> singd_jax.Layers:
    return singd_jax.find_layers(loss, structures=structures)(start(n, dtype), X)


def alone(make: Any, params: Any) -> Any:
    """The same with a transformation for each layer and for each other parameter."""
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key + getattr(path[1], "key", "") if len(path) > 1 else "free",
        params,
    )
    return optax.multi_transform({name: make() for name in set(jax.tree.leaves(labels))}, labels)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        ("float32", {}),
        ("float32", {"structures": "hierarchical:1,1"}),
        ("float32", {"recipe": "paper"}),
        ("bfloat16", {}),
        ("bfloat16", {"rounding": "kahan"}),
    ],
    ids=str,
)
def test_they_step_as_each_of_them_alone(dtype: str, given: Any) -> None:
    params, layers = start(3, dtype), layers_of(3, jnp.dtype(dtype))
    make = functools.partial(singd_jax.singd, 0.1, layers=layers, T=2, growing_T=False, **given)
    found = []
    for tx in (make(), alone(make, params)):
        now, state = params, tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(3):
            _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(now, state, X)
            updates, state = update(grads, state, now, curvature=curvature)
            now = optax.apply_updates(now, updates)
        found.append(jax.tree.map(lambda a: np.asarray(a, np.float32), now))
    # the same random bits; a kernel of another step may round its last digit in another way
    tolerance = 1e-5 if dtype == "float32" else 2.0**-7
    for a, b, old in zip(*map(jax.tree.leaves, (*found, params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        assert np.any(a != np.asarray(old, np.float32))


def lowered(n: int) -> Any:
    """The step of n equal layers."""
    params, layers = start(n), layers_of(n)
    tx = singd_jax.singd(layers=layers)
    state = tx.init(params)
    _, grads, curvature = jax.eval_shape(
        singd_jax.value_and_curvature(loss, layers), params, state, X
    )

    def update(grads: Any, state: Any, params: Any, curvature: Any) -> Any:
        return tx.update(grads, state, params, curvature=curvature)

    return jax.jit(update).lower(grads, state, params, curvature)


def test_a_step_of_many_has_the_products_of_two() -> None:
    def operations(n: int) -> int:
        text = lowered(n).as_text()
        return text.count("stablehlo.dot_general") + text.count("stablehlo.power")

    assert operations(6) == operations(2)


@pytest.mark.slow
def test_a_step_of_many_copies_none_and_computes_nothing_in_every_kernel() -> None:
    def loss(p: Any, x: Any) -> Any:
        for w in p.values():
            x = jnp.tanh(x @ w)
        return mean_square(x)

    side, found = 64, []
    for n in (2, 8):
        params = {f"{i}": array(side, side, seed=i) for i in range(n)}
        tx = singd_jax.singd(layers=singd_jax.find_layers(loss)(params, array(8, side)))
        state = tx.init(params)
        update = jax.jit(functools.partial(tx.update, curvature=None), donate_argnums=(0, 1))
        step = update.lower(params, state, params).compile()
        matrices = step.memory_analysis().temp_size_in_bytes / (4 * side**2)  # type: ignore[union-attr]
        found.append((matrices, step.as_text().count("is-finite(")))
    (_, few), (matrices, many) = found
    assert matrices < 3 * 8  # 7 for each where they are stacked
    assert many - few < 12 * 6  # 18 for each where all kernels compute it


@pytest.mark.parametrize(
    ("structures", "copies", "branches"),
    [("blockdiagonal:1", 16, 0), ("blockdiagonal:1", 1, 1), ("dense", 1, 1), ("diagonal", 1, 0)],
)
def test_curvature_that_costs_little_is_measured_in_every_step(
    structures: str, copies: int, branches: int
) -> None:
    x = jnp.tile(X, (copies, 1))
    layers = singd_jax.find_layers(loss, structures=structures)(start(2), x)
    params, tx = start(2), singd_jax.singd(layers=layers, rows=4)
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(singd_jax.value_and_curvature(loss, layers)).lower(params, state, x)
    assert lowered.as_text().count("stablehlo.case") == branches
