"""Parameters in half precision, in float64 and of complex numbers; rows of one byte."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from jax_all_cases import CASES
from jax_cases import X, array, mean_square
from jax_runs import LAYERS, assert_close, loss, run, start, stepper

import singd_jax
from singd_core.optimizer import Fallback


@pytest.mark.slow
def test_complex_parameters_follow_optax_adamw():
    case = CASES["complex_numbers"]()
    layers = singd_jax.find_layers(case.loss)(case.params, X)
    fallback = Fallback(lr=0.01, weight_decay=0.1)
    tx, adamw = (
        singd_jax.singd(0.0, layers=layers, warmup=0, fallback=fallback),
        optax.adamw(0.01, weight_decay=0.1),
    )
    params, state = case.params, tx.init(case.params)
    expected, adam_state = params["c"], adamw.init(params["c"])
    step = jax.jit(functools.partial(tx.update, curvature=None))
    for _ in range(3):
        grads = jax.tree.map(jnp.conj, jax.grad(case.loss)(params, X))
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        u, adam_state = adamw.update(grads["c"], adam_state, expected)
        expected = expected + u
    assert_close(params["c"], expected)
    assert state.core.fallback["c"].exp_avg_sq.dtype == "float32"
    with pytest.raises(ValueError, match="c is complex, and optax"):
        singd_jax.MultiSteps(tx, 2, layers=layers).init(params)


@pytest.mark.parametrize("dtype", cases(["bfloat16", "float16"], fast=["float16"]))
def test_half_precision_parameters(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), start())
    x = X.astype(dtype)
    layers = singd_jax.find_layers(loss)(params, x)
    tx = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False)
    step = stepper(tx, layers=layers)
    state = tx.init(params)
    values = []
    for _ in range(6):
        params, state, value = step(params, state, x)
        values.append(float(value))
    assert values[-1] < values[0]
    assert int(state.core.skipped) == 0
    assert {a.dtype.name for a in jax.tree.leaves(params)} == {dtype}
    factor = "float32" if dtype == "float16" else dtype
    assert state.core.layers["v"].factors.K.matrix.dtype == factor


@pytest.mark.parametrize("rows", [math.inf, 3])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_rows_of_one_byte_are_measured_in_float32(dtype, rows):
    def narrow(own, p, x):
        x, w = (a.astype(dtype).astype(own) for a in (x, p["w"]))
        y = (x @ (0.5 * w)).astype(dtype).astype(jnp.float32)
        return mean_square(y + p["b"])

    params, found = {"w": array(4, 3), "b": array(3)}, []
    for own in (dtype, "float32"):
        of = functools.partial(narrow, own)
        layers = singd_jax.find_layers(of)(params, X)
        assert singd_jax.check(of, layers)(params, X)["w"] < 0.1
        state = singd_jax.singd(layers=layers, kfac=True, T=1, rows=rows).init(params)
        found.append(jax.jit(singd_jax.value_and_curvature(of, layers))(params, state, X)[2])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype("float64"), start())
        x = X.astype("float64")
        layers = singd_jax.find_layers(loss, structures="dense")(params, x)
        tx = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False)
        step = stepper(tx, layers=layers)
        state = tx.init(params)
        for _ in range(3):
            params, state, _ = step(params, state, x)
        assert {a.dtype.name for a in jax.tree.leaves(params)} == {"float64"}
        assert state.core.layers["v"].factors.K.matrix.dtype == "float64"
        gaps = singd_jax.check(loss, layers)(params, x)
        assert max(gaps.values()) < 1e-14
    assert_close(
        params, run(singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False), 3)[0], 1e-5
    )
