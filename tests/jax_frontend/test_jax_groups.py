"""Masks and groups may divide a layer, be empty, and accumulate on their own."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_cases import X
from jax_runs import LAYERS, assert_close, loss, run, start, state_of, states_of, stepper

import singd_jax

GIVEN = {"layers": LAYERS, "T": 2, "growing_T": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{}, {"recipe": "paper", "kfac": True}], ids=["normalized", "kfac"]
)
def test_a_weight_is_trained_alone_where_its_bias_is_in_another_group(given):
    biases = ("a", "b")

    def of_weights(p, x):  # the same loss to one who sees constants for biases
        return loss(p | {k: start()[k] for k in biases}, x)

    weights = {k: v for k, v in start().items() if k not in biases}
    layers = singd_jax.find_layers(of_weights, structures="dense")(weights, X)
    alone = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False, **given)
    expected, alone_state = run(alone, params=weights, step=stepper(alone, of_weights, layers))

    tx = singd_jax.singd(0.02, **GIVEN | given)
    matrices = {k: k not in biases for k in start()}
    labels = {k: "weights" if own else "biases" for k, own in matrices.items()}
    frozen = {"weights": tx, "biases": optax.set_to_zero()}
    params, state = run(optax.multi_transform(frozen, labels))
    assert_close({k: params[k] for k in weights}, expected)
    assert_close(state_of(state).core, alone_state.core)

    for others in (optax.adam(1e-3), singd_jax.singd(0.02, **GIVEN)):
        groups = {"weights": tx, "biases": others}
        params, state = run(optax.multi_transform(groups, labels))
        assert set(states_of(state)[-1].core.layers) == {"v", "w"}
        assert not jnp.array_equal(params["a"], start()["a"])
    run(optax.masked(tx, matrices))
    run(optax.masked(singd_jax.scale_by_singd(**GIVEN), matrices))
    own = singd_jax.MultiSteps(tx, 2, layers=LAYERS)
    run(optax.masked(own.gradient_transformation(), matrices))


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    "make", [lambda **given: singd_jax.singd(0.02, **given), singd_jax.scale_by_singd]
)
def test_a_group_without_parameters_takes_steps(make, T):
    tx = make(layers=LAYERS, T=T, growing_T=False)
    _, state = run(optax.masked(tx, dict.fromkeys(start(), False)), 1)
    assert int(state_of(state).core.step) == 1
    own = singd_jax.MultiSteps(tx, 2, layers=LAYERS).gradient_transformation()
    run(optax.multi_transform({"all": optax.sgd(0.1), "none": own}, "all"), 2)


@pytest.mark.slow
def test_a_group_accumulates_on_its_own():
    plain = singd_jax.singd(0.02, **GIVEN)
    labels = {"v": "first", "a": "first", "scale": "last", "w": "last", "b": "last"}
    own = singd_jax.MultiSteps(plain, 2, layers=LAYERS).gradient_transformation()
    params, state = run(optax.multi_transform({"first": own, "last": own}, labels))
    groups = optax.multi_transform({"first": plain, "last": plain}, labels)
    assert_close(params, run(groups, 2)[0])  # of equal micro-batches

    mixed = optax.multi_transform({"first": own, "last": plain}, labels)
    _, state = run(mixed)
    assert [int(found.core.step) for found in states_of(state)] == [2, 4]
    accumulating = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    with pytest.raises(ValueError, match="the curvature has no 'v', which singd_jax"):
        accumulating.update(start(), accumulating.init(start()), start(), curvature={})


def test_chain_finds_its_state_and_passes_the_curvature_on():
    tx = optax.chain(
        optax.clip_by_global_norm(1e9), singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False)
    )
    assert_close(run(tx)[0], run(singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False))[0])
    with pytest.raises(ValueError, match="holds no state of singd"):
        run(optax.sgd(0.1))


def test_masked_leaves_parameters_out():
    tx = optax.masked(
        singd_jax.singd(0.02, layers=LAYERS, T=1), {k: k not in ("v", "a") for k in start()}
    )
    state = tx.init(start())
    assert set(state_of(state).core.layers) == {"w"}
    _, grads, curvature = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))(start(), state, X)
    assert set(curvature) == {"w"}
    updates, _ = jax.jit(tx.update)(grads, state, start(), curvature=curvature)
    assert_close(updates["v"], grads["v"], 0.0)  # what masked does with the rest


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2])
def test_groups_with_settings_of_their_own(T):
    groups = {
        "first": singd_jax.singd(0.02, layers=LAYERS, T=T, growing_T=False, structures="diagonal"),
        "last": singd_jax.singd(0.02, layers=LAYERS, T=3, recipe="paper"),
    }
    labels = {"v": "first", "a": "first", "scale": "first", "w": "last", "b": "last"}

    tx = optax.multi_transform(groups, labels)
    function = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))
    update = jax.jit(tx.update)
    params, state = start(), tx.init(start())
    single = {
        k: optax.masked(group, {leaf: label == k for leaf, label in labels.items()})
        for k, group in groups.items()
    }
    alone = {k: masked.init(params) for k, masked in single.items()}
    for _ in range(4):
        _, grads, curvature = function(params, state, X)
        updates, state = update(grads, state, params, curvature=curvature)
        for k, masked in single.items():  # each as if it were alone
            _, _, own = function(params, alone[k], X)
            expected, alone[k] = masked.update(grads, alone[k], params, curvature=own)
            for leaf, label in labels.items():
                if label == k:
                    assert_close(updates[leaf], expected[leaf])
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="holds 2 states of singd where one is needed"):
        singd_jax.flatten(state)
    twice = optax.chain(*groups.values())
    with pytest.raises(ValueError, match="two transformations of singd train v, w"):
        run(twice)


@pytest.mark.slow
def test_a_group_may_be_a_branch_of_the_parameters_or_all_of_them():
    def nested(p, x):
        return loss(p["all"] | p["none"], x)

    params = {"all": start(), "none": {}}
    layers = singd_jax.find_layers(nested)(params, X)
    tx = singd_jax.singd(0.02, layers=layers)
    whole, _, _ = stepper(tx, nested, layers)(params, tx.init(params), X)
    for labels in ({"all": "a", "none": "b"}, "a"):
        groups = optax.multi_transform({"a": tx, "b": tx}, labels)
        state = groups.init(params)
        sizes = [len(own.core.layers) for own in states_of(state)]
        assert sizes == [2, 0]
        new, state, _ = stepper(groups, nested, layers)(params, state, X)
        assert [int(own.core.step) for own in states_of(state)] == [1, 1]
        assert_close(new, whole)
