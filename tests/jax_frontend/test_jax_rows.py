"""Factors that are measured with some of the rows, others in each refresh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_all_cases import CASES
from jax_cases import IMAGES, SEQUENCE, X, array, mean_square
from jax_runs import LAYERS, assert_close, loss, run, start, state_of, stepper

import singd_jax
from singd_core.layers import Convolution, Linear
from singd_core.optimizer import Optimizer


def function_of_the_step(loss, params, batch, structures, has_aux=False, of_layers=None, **given):
    """The curvature as a function of the number of steps taken."""
    layers = singd_jax.find_layers(loss, **of_layers or {})(params, *batch)
    tx = singd_jax.singd(layers=layers, structures=structures, T=1, **given)
    state = tx.init(params)
    function = singd_jax.value_and_curvature(loss, layers, has_aux=has_aux)

    def at(step, params=params, batch=batch):
        core = dataclasses.replace(state.core, step=step)
        return function(params, state.with_core(core), *batch)[2]

    return at


def arrays(curvature):
    """What a curvature says, as dense arrays."""
    return {name: (c.H_K.dense(), c.H_C.dense(), c.t_U, c.t_G) for name, c in curvature.items()}


def convolve(x, w):
    numbers = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, w, (1, 2), ((1, 0), (0, 1)), dimension_numbers=numbers)


PRODUCTS = {
    "dense": (Linear(transposed=True), jnp.matmul, SEQUENCE, array(4, 3)),
    "convolution": (
        Convolution((2, 2), stride=(1, 2), padding=((1, 0), (0, 1))),
        convolve,
        jnp.moveaxis(IMAGES, -1, 1),
        array(3, 2, 2, 2),
    ),
}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# Among the fast ones each product has each structure, and each way to count positions, once.
@pytest.mark.parametrize(
    ("name", "structures", "kfac_approx"),
    [
        ("convolution", "blockdiagonal:2", "expand"),
        slow("dense", "dense", "reduce"),
        slow("dense", "dense", "expand"),
        slow("dense", "blockdiagonal:2", "reduce"),
        slow("convolution", "dense", "reduce"),
        slow("dense", "blockdiagonal:2", "expand"),
        slow("convolution", "dense", "expand"),
        slow("convolution", "blockdiagonal:2", "reduce"),
    ],
)
def test_the_rows_are_those_of_the_core(name, structures, kfac_approx):
    kind, product, x, w = PRODUCTS[name]
    rows = 2 if structures != "dense" or kfac_approx == "reduce" else 9
    given = {"structures": (structures, structures), "rows": rows}
    params, how = {"w": w}, {"kfac_approx": kfac_approx}
    at = jax.jit(
        function_of_the_step(
            lambda p, x: mean_square(product(x, p["w"])), params, (x,), of_layers=how, **given
        )
    )
    core = Optimizer({"w": kind}, T=1, **given, **how)
    g = jax.grad(mean_square)(product(x, w))
    seen = []
    for step in (0, 1, 7):
        state = dataclasses.replace(core.init(params), step=jnp.asarray(step))
        expected = arrays(core.curvature({"w": (x, g)}, state, params))
        # as arguments: XLA of jax 0.8 folds a convolution of constants wrongly
        got = arrays(at(jnp.asarray(step), params, (x,)))
        assert_close(got, expected, 2e-6)
        seen.append(np.concatenate([a.ravel() for a in got["w"]]))
    assert at._cache_size() == 1
    assert any(not np.allclose(seen[0], other, rtol=1e-3) for other in seen[1:])


SAMPLED = [
    "raw_mlp",
    "linen_cnn",
    "linen_transformer_block",
    "scan_over_layers",
    "remat_inside_scan",
    "scan_over_time",
    "accumulation_inside_the_loss",
    "experts",
    "tied_embedding",
    "inside_custom_jvp",
    "custom_jvp_inside_remat_and_scan",
    "vmap_over_examples",
    "inner_gradient",
]


# Cases of several that others show one by one.
REPEATED = "remat_inside_scan", "linen_transformer_block", "custom_jvp_inside_remat_and_scan"


# Positions are averaged over in a convolution and a scan, the other cases of it are slow.
@pytest.mark.parametrize(
    ("kfac_approx", "name"),
    [
        *(slow("expand", c) if c in REPEATED else ("expand", c) for c in SAMPLED),
        *(
            ("reduce", c) if c in ("linen_cnn", "scan_over_time") else slow("reduce", c)
            for c in SAMPLED
        ),
    ],
)
def test_few_rows_have_the_mean_of_all(kfac_approx, name):
    case = CASES[name]()
    options = {"of_layers": {"kfac_approx": kfac_approx, **case.options}}
    options["has_aux"] = options["of_layers"].pop("has_aux", False)
    make = functools.partial(
        function_of_the_step, case.loss, case.params, case.batch, "blockdiagonal:1", **options
    )
    full = arrays(jax.jit(make(rows=math.inf))(jnp.asarray(0)))
    steps = jnp.arange(4096)
    some = jax.jit(lambda: jax.lax.map(lambda s: arrays(make(rows=2)(s)), steps))()
    for key, expected in full.items():
        for got, want in zip(some[key], expected, strict=True):
            assert got.shape[1:] == want.shape
            np.testing.assert_allclose(
                np.mean(got, axis=0), want, rtol=0.02, atol=0.02 * np.abs(want).max() + 1e-12
            )
    assert any(np.std(a, axis=0).max() > 1e-3 * np.abs(a).max() for a in jax.tree.leaves(some))


@pytest.mark.slow
def test_as_many_rows_as_there_are_change_nothing():
    given = {"learning_rate": 0.05, "layers": LAYERS, "T": 1}
    expected = run(singd_jax.singd(**given, rows=math.inf))[0]
    assert_close(run(singd_jax.singd(**given, rows=len(X)))[0], expected, 0.0)
    assert_close(run(singd_jax.singd(**given))[0], expected, 0.0)  # 256
    paper = run(singd_jax.singd(0.05, layers=LAYERS, recipe="paper", T=1))[1]
    assert paper.fixed.rows == math.inf
    assert run(singd_jax.singd(**given))[1].fixed.rows == 256


def test_a_step_with_few_rows_is_compiled_once():
    tx = singd_jax.singd(0.05, layers=LAYERS, structures="blockdiagonal:1", rows=2, T=2)

    @jax.jit
    def step(params, state, x):
        function = singd_jax.value_and_curvature(loss, LAYERS)
        value, grads, curvature = function(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    params, state = run(tx, 6, step=step)
    assert step._cache_size() == 1
    assert int(state.core.skipped) == 0
    expected = run(singd_jax.singd(0.05, layers=LAYERS, structures="diagonal", T=2), 6)[0]
    assert not np.allclose(params["v"], expected["v"], rtol=1e-4)


@pytest.mark.slow
def test_micro_batches_are_measured_with_some_of_their_rows():
    tx = singd_jax.singd(0.05, layers=LAYERS, structures="diagonal", rows=2, T=1)
    own = singd_jax.MultiSteps(tx, 2, layers=LAYERS)
    params, state = start(), own.init(start())
    step, curvature = stepper(own), singd_jax.value_and_curvature(loss, LAYERS)
    found = [arrays(curvature(params, state, x)[2]) for x in (X, X[::-1])]
    _, inner, _ = step(params, state, X)
    assert_close(arrays(inner.acc_grads.curvature), found[0])
    moved, state, _ = step(params, inner, X[::-1])
    _, grads, c = curvature(params, tx.init(params), X)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, c, curvature(params, tx.init(params), X[::-1])[2])
    updates, _ = tx.update(grads, tx.init(params), params, curvature=mean)
    assert_close(moved, optax.apply_updates(params, updates), 1e-5)
    assert int(state_of(state).core.skipped) == 0


def test_fewer_rows_cost_less():
    x, params = array(512, 16), {"w": array(16, 16)}

    def loss(p, x):
        return mean_square(x @ p["w"])

    layers = singd_jax.find_layers(loss)(params, x)

    def flops(rows):
        tx = singd_jax.singd(layers=layers, structures="dense", rows=rows, T=1)
        function = jax.jit(singd_jax.value_and_curvature(loss, layers))
        return function.lower(params, tx.init(params), x).compile().cost_analysis()["flops"]

    assert flops(16) < 0.6 * flops(math.inf)


def test_rows_are_a_number_and_it_is_said_how():
    with pytest.raises(ValueError, match=r"rows=0\.5: must be at least 1"):
        singd_jax.singd(layers=LAYERS, rows=0.5)
    injected = optax.inject_hyperparams(singd_jax.singd)
    with pytest.raises(ValueError, match=r"rows=.*static_args of optax\.inject_hyperparams"):
        injected(layers=LAYERS, rows=2).init(start())
    static = optax.inject_hyperparams(singd_jax.scale_by_singd, static_args=("rows",))
    assert state_of(static(layers=LAYERS, rows=2).init(start())).fixed.rows == 2
