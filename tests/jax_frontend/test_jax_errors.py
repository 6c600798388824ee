"""What cannot be right is an error that names the setting, the parameter or the call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax_all_cases import CASES
from jax_cases import X, array, mean_square
from jax_runs import LAYERS, assert_close, loss, start, stepper

import singd_jax


def test_a_name_is_not_that_of_a_transposed_use():
    def loss(p, x):
        return mean_square(x @ p["w"] @ p["w"].T + x @ p["w transposed"])

    def untied(p, x):
        return mean_square(x @ p["w"] + x @ p["w transposed"])

    params = {"w": array(4, 4), "w transposed": array(4, 4, seed=1)}
    with pytest.raises(ValueError, match="'w transposed' is the name of a parameter, and"):
        singd_jax.find_layers(loss)(params, X)
    layers = singd_jax.find_layers(untied)(params, X)
    tx = singd_jax.singd(0.02, layers=layers, T=1)
    _, state, _ = stepper(tx, untied, layers)(params, tx.init(params), X)
    assert int(state.core.layers["w transposed"].factors.averages.k) == 1


def test_layers_of_other_parameters_are_told_of():
    tx = singd_jax.singd(0.02, layers=LAYERS)
    with pytest.raises(ValueError, match="the parameters have no 'a', which the layers were found"):
        tx.init({"other": X})
    params = {"other": array(4, 3)}
    other = singd_jax.find_layers(lambda p, x: mean_square(x @ p["other"]))(params, X)
    with pytest.raises(ValueError, match="the state has the layers v, w, and the layers are other"):
        singd_jax.value_and_curvature(loss, other)(start(), tx.init(start()), X)
    state = singd_jax.singd(0.02, layers=other).init(params)
    function = singd_jax.value_and_curvature(lambda p, x: mean_square(x @ p["other"]), other)
    _, _, curvature = function(params, state, X)
    with pytest.raises(ValueError, match="the curvature is of the layers other, and the state of"):
        tx.update(start(), tx.init(start()), start(), curvature=curvature)


@pytest.mark.parametrize(
    "make", [functools.partial(singd_jax.singd, 0.1), singd_jax.scale_by_singd]
)
def test_a_leaf_that_does_not_fit_is_named(make):
    tx, params = make(layers=LAYERS), start()
    state = tx.init(params)
    without = {k: v for k, v in params.items() if k != "a"}
    turned = params | {"v": params["v"].T}
    function = singd_jax.value_and_curvature(lambda p, x: jnp.sum(p["v"]), LAYERS)
    check = singd_jax.check(lambda p, x: jnp.sum(p["v"]), LAYERS)
    for use in (
        tx.init,
        lambda p: tx.update(p, state, params, curvature=None),
        lambda p: function(p, state, X),
        lambda p: check(p, X),
    ):
        with pytest.raises(ValueError, match="have no 'a', which the layers were found with"):
            use(without)
        with pytest.raises(ValueError, match=r"'v' has shape \(5, 4\) .* and had \(4, 5\)"):
            use(turned)
    with pytest.raises(ValueError, match="'z' is none of the parameters"):
        tx.init(params | {"z": X})
    with pytest.raises(ValueError, match=r"'scale' has shape \(6, 4\)"):
        tx.init(params | {"scale": X})


def test_parameters_further_than_those_of_the_state_are_named():
    tx = singd_jax.singd(0.1, layers=LAYERS)
    state = tx.init(start())
    with pytest.raises(ValueError, match="'z' is none of the parameters"):
        tx.update(start() | {"z": X}, state, start(), curvature=None)
    without = {k: v for k, v in start().items() if k != "scale"}
    with pytest.raises(ValueError, match="the parameters have no 'scale'"):
        tx.update(start(), state, without, curvature=None)


def test_a_python_number_is_told_of_where_no_layers_were_found():
    params = {"w": jnp.ones((4, 3)), "s": 1.0}
    tx = singd_jax.singd()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'s' was a Python number .*make it jnp\.asarray"):
        tx.update(jax.tree.map(jnp.asarray, params), state, params)


def test_a_loss_that_was_not_given_is_missed():
    """Its layers would learn from gradients alone, and nobody would be told."""
    tx = singd_jax.singd()
    with pytest.raises(
        ValueError, match=r"no loss to find the layers of: give it singd\(loss=loss"
    ):
        tx.init(start(), X)
    state = tx.init(start())
    for measure in (singd_jax.value_and_grad(loss), singd_jax.value_and_curvature(loss, LAYERS)):
        with pytest.raises(ValueError, match=r"nothing to measure: give it singd\(loss=loss\)"):
            measure(start(), state, X)


@pytest.mark.slow
def test_the_batch_size_must_be_seen_or_told():
    def indexed(p, x, rows):
        return loss(p, x[rows])

    def both(p, x, rows):
        return loss(p, x[rows]) + loss(p, x)

    rows = jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"batch\[0\] 6, batch\[1\] 2"):
        singd_jax.find_layers(both)(start(), X, rows)
    layers = singd_jax.find_layers(both, batch_size=lambda x, rows: len(rows))(start(), X, rows)
    assert set(layers) == {"v", "w"}
    tx = singd_jax.singd(layers=LAYERS, T=1)
    state = tx.init(start())
    _, _, expected = singd_jax.value_and_curvature(loss, LAYERS)(start(), state, X[rows])
    found = singd_jax.find_layers(indexed)(start(), X, rows)  # all layers multiply two rows
    _, _, seen = singd_jax.value_and_curvature(indexed, found)(start(), state, X, rows)
    assert_close(seen, expected)


def test_setting_errors_name_the_setting():
    with pytest.raises(ValueError, match="T=0"):
        singd_jax.singd(layers=LAYERS, T=0)
    with pytest.raises(ValueError, match=r"T=.*: must be a number of steps; optax"):
        singd_jax.singd(layers=LAYERS, T=lambda count: 10)
    with pytest.raises(ValueError, match="structures"):
        singd_jax.singd(layers=LAYERS, structures="dens")
    with pytest.raises(ValueError, match=r"preconditioner_dtype=.*: give two, one for K"):
        singd_jax.singd(layers=LAYERS, preconditioner_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="loss_average"):
        singd_jax.find_layers(loss, loss_average="mean")


UNCALLED, PLAIN = singd_jax.find_layers(loss), singd_jax.singd(layers=LAYERS)
SECOND = r"layers must be what .*find_layers\(loss\)\(params, .*; the second call is missing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: singd_jax.singd(layers=UNCALLED), SECOND),
        (lambda: singd_jax.value_and_curvature(loss, UNCALLED), SECOND),
        (lambda: singd_jax.check(loss, UNCALLED), SECOND),
        (lambda: singd_jax.MultiSteps(PLAIN, 2, layers=UNCALLED), SECOND),
        (lambda: singd_jax.singd(layers={}), "layers must be .* not a dict$"),
        (lambda: singd_jax.singd(b1=0.9), "no argument 'b1': b1 is 'momentum' here"),
        (lambda: singd_jax.singd(eps=1e-8), r"'damping' here; .*fallback=Fallback\(eps=...\)"),
        (lambda: singd_jax.singd(mask=lambda p: p), r"weight_decay=0.0\) keeps decay from vectors"),
        (lambda: singd_jax.singd(mu_dtype="bfloat16"), "'momentum_dtype' here"),
        (lambda: singd_jax.singd(lr=0.1), "no argument 'lr': was 'learning_rate' meant"),
        (lambda: singd_jax.singd(linen.Dense(3)), "learning_rate must be a number or a schedule"),
        (lambda: singd_jax.singd(damping=lambda t: jnp.ones(2)), "damping must be a number or a"),
        (lambda: singd_jax.singd(damping=lambda t: (t, t)), "damping must be a number or a"),
    ],
)
def test_what_is_given_in_place_of_something_else_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_filtered_equinox_module_is_told_of():
    import equinox as eqx

    case = CASES["equinox_mlp"]()
    filtered = eqx.filter(case.params, eqx.is_inexact_array)
    with pytest.raises(TypeError, match=r"model itself, .* not a filtered one"):
        singd_jax.singd(loss=case.loss).init(filtered, *case.batch)


def test_what_comes_with_the_value_has_to_be_arrays():
    def named(params, x):
        return jnp.mean((x @ params["w"]) ** 2), "a name"

    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
    tx = singd_jax.singd(loss=named)
    state = tx.init(params, x)
    with pytest.raises(TypeError, match="the loss returns 'a name', which is no array"):
        singd_jax.value_and_grad(named, has_aux=True)(params, state, x)


@pytest.mark.parametrize(
    "value",
    [
        lambda x, y: y.mean() if y.sum() > 0 else -y.mean(),
        lambda x, y: y[x[:, 0] > 0].mean(),
        lambda x, y: y.mean() * np.asarray(x).max(),
        lambda x, y: y.mean() * len(range(y.sum().astype(int))),
    ],
)
def test_a_loss_that_asks_for_values_is_told_that_it_is_traced(value):
    def asks(p, x):
        return value(x, x @ p["w"])

    params = {"w": array(4, 3)}
    jax.value_and_grad(asks)(params, X)  # no fault where nothing is traced
    with pytest.raises((TypeError, IndexError)) as caught:
        singd_jax.singd(loss=asks).init(params, X)
    assert any("Write jnp.where or jax.lax.cond" in note for note in caught.value.__notes__)


def test_gradients_that_are_no_numbers_are_no_bug():
    def distance(p, x):
        return jnp.linalg.norm(x @ p["w"])  # which has no gradient at 0

    check = singd_jax.check(distance, singd_jax.find_layers(distance)({"w": array(4, 3)}, X))
    with pytest.raises(ValueError, match="the loss is 0, and gradients of w are NaN or infinite"):
        check({"w": jnp.zeros((4, 3))}, X)
