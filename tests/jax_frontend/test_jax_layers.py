"""Which layers are found in which models, and that their rows multiply to their gradients."""

import jax
import jax.numpy as jnp
import jax_layout_cases  # noqa: F401 - adds its cases
import pytest
from jax_cases import CASES, X, array, mean_square

import singd_jax


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found_and_their_rows_multiply_to_their_gradients(name):
    case = CASES[name]()
    has_aux = case.options.pop("has_aux", False)
    layers = singd_jax.find_layers(case.loss, **case.options)(case.params, *case.batch)
    assert set(layers) == case.layers, layers
    assert set(layers.others) == case.others, layers
    assert "not read by the loss" not in layers.others.values(), layers
    # float32; bfloat16 in one case rounds what it multiplies to 8 bits, in another order
    tolerance = 2e-2 if name == "mixed_precision" else 2e-5
    check = singd_jax.check(case.loss, layers, tolerance=tolerance, has_aux=has_aux)
    gaps = check(case.params, *case.batch)
    assert set(gaps) == case.layers


def test_weights_that_are_stacked_inside_the_loss_are_listed_with_a_remedy():
    def loss(p, x):
        return mean_square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack(p))[0])

    layers = singd_jax.find_layers(loss)([array(4, 4), array(4, 4, seed=1)], X)
    assert set(layers.others) == {"0", "1"}
    assert all("keep the stack as one parameter" in why for why in layers.others.values())


@pytest.mark.parametrize(("name", "told"), [("scan_over_time", True), ("scan_over_layers", False)])
def test_the_table_tells_that_reduced_rows_of_a_scan_over_time_are_not_averaged(name, told):
    case = CASES[name]()
    layers = singd_jax.find_layers(case.loss, kfac_approx="reduce")(case.params, *case.batch)
    notes = [
        layer.notes == ("the steps of a scan are not averaged over",) for layer in layers.values()
    ]
    assert notes == [told] * len(layers)
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    assert not any(layer.notes for layer in layers.values())
