"""Masks and groups may divide a layer, be empty, and accumulate on their own."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_cases import X
from test_jax_transform import LAYERS, assert_close, loss, run, start, stepper

import singd_jax
from singd_jax._state import find_state, find_states

GIVEN = {"layers": LAYERS, "T": 2}


@pytest.mark.parametrize("given", [{}, {"recipe": "paper", "kfac": True}], ids=["robust", "kfac"])
def test_a_weight_is_trained_alone_where_its_bias_is_in_another_group(given):
    biases = ("a", "b")

    def of_weights(p, x):  # the same loss to one who sees constants for biases
        return loss(p | {k: start()[k] for k in biases}, x)

    weights = {k: v for k, v in start().items() if k not in biases}
    layers = singd_jax.find_layers(of_weights, structures="dense")(weights, X)
    alone = singd_jax.singd(0.02, layers=layers, T=2, **given)
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
