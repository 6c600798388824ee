"""Masks and groups may divide a layer, be empty, and accumulate on their own."""

import jax.numpy as jnp
import optax
import pytest
from jax_cases import X
from test_jax_transform import LAYERS, assert_close, loss, run, start, stepper

import singd_jax
from singd_jax._state import find_state, find_states

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
    assert_close(find_state(state).core, alone_state.core)

    for others in (optax.adam(1e-3), singd_jax.singd(0.02, **GIVEN)):
        groups = {"weights": tx, "biases": others}
        params, state = run(optax.multi_transform(groups, labels))
        assert set(find_states(state)[-1].core.layers) == {"v", "w"}
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
    assert int(find_state(state).core.step) == 1
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
    assert [int(found.core.step) for found in find_states(state)] == [2, 4]
    accumulating = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    with pytest.raises(ValueError, match="the curvature has no 'v', which singd_jax"):
        accumulating.update(start(), accumulating.init(start()), start(), curvature={})


def test_a_named_chain_that_drops_the_curvature_is_an_error():
    plain = singd_jax.singd(0.02, **GIVEN)
    clip = ("clip", optax.clip_by_global_norm(1e9))
    lost = optax.named_chain(clip, ("singd", optax.MultiSteps(plain, 2).gradient_transformation()))
    with pytest.raises(ValueError, match=r"take singd_jax\.MultiSteps"):
        run(lost)
    own = singd_jax.MultiSteps(plain, 2, layers=LAYERS).gradient_transformation()
    params, _ = run(optax.named_chain(clip, ("singd", own)))
    assert_close(params, run(plain, 2)[0])
