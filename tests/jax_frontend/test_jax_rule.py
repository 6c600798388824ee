"""The weight rule: momenta like the parameters, steps of a size of their own, growing gaps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_all_cases import CASES
from jax_cases import X, array, mean_square
from jax_runs import LAYERS, assert_close, loss, run, start, state_of, stepper

import singd_jax
from singd_core import Optimizer
from singd_core.optimizer import Fallback


def of_layers_alone(p, x):
    return mean_square(jnp.tanh(x @ p["v"] + p["a"]) @ p["w"] + p["b"])


ALONE = {k: v for k, v in start().items() if k != "scale"}


@pytest.mark.parametrize(
    "name",
    ["linen_transformer_block", "linen_cnn", "scan_over_layers", "experts", "tied_embedding"],
)
@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_momenta_have_the_shapes_of_the_leaves(name, recipe):
    case = CASES[name]()
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    state = singd_jax.singd(layers=layers, recipe=recipe).init(case.params)
    found, _ = jax.tree_util.tree_flatten_with_path(case.params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in found}
    for key, own in state.core.layers.items():
        shapes = [m.shape for m in own.momenta]
        assert shapes == [leaves[leaf].shape for leaf in layers[key].leaves]
        late = own.late and {a.shape for a in (own.late.squares, own.late.weights)}
        assert late == ({layers[key].shape[0]} if recipe == "normalized" else None)


def test_momenta_of_parts_of_a_leaf_have_the_shapes_of_the_parts():
    def packed(p, x):
        q, k = x @ p["w"][:, :4] + p["b"][:4], x @ p["w"][:, 4:] + p["b"][4:]
        return mean_square(q) + mean_square(k)

    params = {"w": array(4, 7), "b": array(7)}
    layers = singd_jax.find_layers(packed)(params, X)
    tx = singd_jax.singd(0.1, layers=layers, warmup=0)
    params, state, _ = stepper(tx, packed, layers)(params, tx.init(params), X)
    assert not np.any(params["w"] == array(4, 7))
    assert not np.any(params["b"] == array(7))
    found = {k: [m.shape for m in own.momenta] for k, own in state.core.layers.items()}
    assert found == {"w[:,0:4]": [(4, 4), (4,)], "w[:,4:7]": [(4, 3), (3,)]}


def test_the_momentum_is_that_of_the_gradients():
    tx = singd_jax.singd(0.1, layers=LAYERS, warmup=0, momentum=0.5)
    params, state, expected = start(), tx.init(start()), jax.tree.map(jnp.zeros_like, start())
    step = stepper(tx)
    for _ in range(3):
        grads = jax.grad(loss)(params, X)
        expected = jax.tree.map(lambda m, g: 0.5 * m + g, expected, grads)
        params, state, _ = step(params, state, X)
    for weight, bias in (("v", "a"), ("w", "b")):
        own = state.core.layers[weight]
        assert_close(own.momenta, [expected[weight], expected[bias]])


@pytest.mark.parametrize(
    "c",
    [
        1e-6,
        pytest.param(2.0**-10, marks=pytest.mark.slow),
        3.0,
        pytest.param(1e6, marks=pytest.mark.slow),
    ],
)
def test_a_step_does_not_depend_on_the_scale_of_the_loss(c):
    ends = []
    for scale in (1.0, c):
        scaled = functools.partial(lambda s, p, x: s * of_layers_alone(p, x), scale)
        layers = singd_jax.find_layers(scaled)(ALONE, X)
        tx = singd_jax.singd(layers=layers, warmup=0)
        ends.append(run(tx, 5, ALONE, step=stepper(tx, scaled, layers))[0])
    moved = [np.abs(ends[0][k] - ALONE[k]).max() for k in ALONE]
    assert min(moved) > 0.01
    assert_close(ends[1], ends[0], 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_a_matrix_with_a_zero_gradient_does_not_move(scan):
    def stacked(p, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])
        return mean_square(y)

    loss_, params = (stacked, {"w": array(3, 4, 4)}) if scan else (of_layers_alone, ALONE)
    layers = singd_jax.find_layers(loss_)(params, X)
    tx = singd_jax.singd(layers=layers)
    params, state = run(tx, 3, params, step=stepper(tx, loss_, layers))
    grads = jax.grad(loss_)(params, X)
    if scan:
        grads["w"] = grads["w"].at[1].set(0.0)
        still = {"w": [False, True, False]}
    else:
        grads |= {k: jnp.zeros_like(grads[k]) for k in ("w", "b")}
        still = {"v": False, "a": False, "w": True, "b": True}
    updates, new = jax.jit(functools.partial(tx.update, curvature=None))(grads, state, params)
    for name, expected in still.items():
        axes = (1, 2) if scan else None
        np.testing.assert_array_equal(np.all(updates[name] == 0.0, axis=axes), expected)
    assert int(new.core.skipped) == 0


def test_a_first_gradient_of_zero_leaves_everything_finite():
    tx = singd_jax.singd(layers=LAYERS)
    zeros = jax.tree.map(jnp.zeros_like, start())
    updates, state = jax.jit(functools.partial(tx.update, curvature=None))(
        zeros, tx.init(start()), start()
    )
    assert not np.any(updates["v"])
    assert int(state.core.skipped) == 0
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(state))


def test_the_rates_grow_in_the_warm_up():
    fallback = Fallback(lr=0.01, weight_decay=0.1)
    given = {"layers": LAYERS, "fallback": fallback, "weight_decay": 0.1}
    warm = singd_jax.singd(0.1, warmup=4, **given)
    cold = singd_jax.singd(0.1, warmup=0, **given)
    params, state = start(), warm.init(start())
    assert jax.tree.structure(state) == jax.tree.structure(cold.init(start()))
    warm, cold = (jax.jit(functools.partial(tx.update, curvature=None)) for tx in (warm, cold))
    for t in range(6):
        grads = jax.grad(loss)(params, X)
        updates, new = warm(grads, state, params)
        expected, _ = cold(grads, state, params)
        share = min((t + 1) / 4, 1.0)
        assert_close(updates, jax.tree.map(lambda u, share=share: share * u, expected))
        params, state = optax.apply_updates(params, updates), new


# ---- growing gaps -------------------------------------------------------------------------------


def dues(T, steps):
    """Which steps refresh, by the core, of plain numbers."""
    optimizer = Optimizer({}, T=T)
    state = optimizer.init({"w": np.zeros(1)})
    return [optimizer.due(dataclasses.replace(state, step=t)) for t in range(steps)]


@pytest.mark.parametrize("T", [2, 6, 50])
def test_the_factors_are_refreshed_in_growing_gaps_inside_jit_and_scan(T):
    tx = singd_jax.singd(layers=LAYERS, T=T)
    function = singd_jax.value_and_curvature(loss, LAYERS)

    @jax.jit
    def training(params, state):
        def step(carry, _):
            params, state = carry
            due, k = state.due, state.core.layers["v"].factors.averages.k
            _, grads, curvature = function(params, state, X)
            measured = jnp.any(curvature["v"].H_K.dense() != 0.0)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            refreshed = state.core.layers["v"].factors.averages.k > k
            return (optax.apply_updates(params, updates), state), (due, measured, refreshed)

        return jax.lax.scan(step, (params, state), None, length=130)[1]

    expected = dues(T, 130)
    assert 2 < sum(expected) < 130
    for found in training(start(), tx.init(start())):
        np.testing.assert_array_equal(found, expected)


def test_only_a_gap_of_one_is_known_to_be_always_due():
    for given in ({"T": 1}, {"T": 1, "growing_T": False}):
        state = singd_jax.singd(layers=LAYERS, **given).init(start())
        assert state.T is None
        assert state.due is None
    for given in ({}, {"T": 2, "growing_T": False}):
        state = singd_jax.singd(layers=LAYERS, **given).init(start())
        assert bool(state.due)


@pytest.mark.slow
def test_a_refresh_after_a_gap_makes_up_for_it():
    """One after n steps has the rate 1 − (1 − β₁)ⁿ."""
    tx = singd_jax.singd(layers=LAYERS, T=4, lr_cov=0.3, early_averaging=False)
    constant = functools.partial(singd_jax.singd, layers=LAYERS, T=1, early_averaging=False)
    params, state = run(tx, 40)
    assert bool(state.due)  # in gaps of 4 from here on
    function = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))
    _, grads, curvature = function(params, state, X)
    _, new = jax.jit(tx.update)(grads, state, params, curvature=curvature)
    other = constant(lr_cov=1.0 - 0.7**4, growing_T=False)
    same = other.init(params)
    same = same.with_core(state.core)
    _, expected = jax.jit(other.update)(grads, same, params, curvature=curvature)
    assert_close(*map(without_levels, (new, expected)), 1e-5)  # measured before each refresh


def without_levels(state):
    return {
        name: dataclasses.replace(own, factors=dataclasses.replace(own.factors, levels=None))
        for name, own in state.core.layers.items()
    }


@pytest.mark.slow
def test_gaps_grow_to_a_scheduled_number_of_steps():
    inject = optax.inject_hyperparams(singd_jax.singd, static_args=("warmup",))
    tx = inject(layers=LAYERS, T=lambda count: 2 + 0 * count, warmup=10)
    plain = singd_jax.singd(layers=LAYERS, T=2, warmup=10)
    params, state = run(tx, 25)
    expected, plain_state = run(plain, 25)
    assert_close(params, expected, 1e-5)
    k = state_of(state).core.layers["v"].factors.averages.k
    assert int(k) == int(plain_state.core.layers["v"].factors.averages.k) == sum(dues(2, 25)) == 23


@pytest.mark.slow
def test_micro_batches_of_a_step_are_due_together():
    plain = singd_jax.singd(layers=LAYERS, T=4)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    _, state = run(tx, 2 * 30)
    assert int(state_of(state).core.layers["v"].factors.averages.k) == sum(dues(4, 30)) < 30


def test_the_bare_preconditioner_refreshes_in_growing_gaps():
    tx = optax.chain(singd_jax.scale_by_singd(layers=LAYERS, T=4), optax.scale(-1e-3))
    _, state = run(tx, 30)
    own = state_of(state).core.layers["v"]
    assert own.momenta is own.late is None
    assert int(own.factors.averages.k) == sum(dues(4, 30)) < 30


def test_refreshes_and_check_have_the_full_precision_of_accelerators():
    """Products of float32 have 8 or 11 bits there, and K U K makes their errors larger."""
    seen = []

    def loss(params, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
    layers = singd_jax.find_layers(loss)(params, x)
    singd_jax.check(loss, layers)(params, x)
    assert "highest" in seen
    tx = singd_jax.singd(layers=layers)
    state = tx.init(params)
    _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, x)

    def update(grads, curvature):
        return tx.update(grads, state, params, curvature=curvature)

    assert "HIGHEST" in str(jax.make_jaxpr(update)(grads, curvature))
