"""Which layers are found in which models, and that their rows multiply to their gradients."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax_all_cases import CASES
from jax_cases import N, X, array, mean_square

import singd_jax

# They compile longest, and show nearly what other cases show.
SLOW = {
    "linen_transformer_block",  # its products: head_split_kernels, residual_before_bias
    "linen_lstm",  # scan_over_time
    "haiku_cnn",  # linen_cnn
    "nnx_mlp",  # raw_mlp
    "equinox_mlp",
    "stacked_leaf_in_a_loop",  # indexed_inside_a_loop
    "kernels_of_concatenated_outputs",  # concatenated_kernels_of_one_position
    "remat_inside_scan",  # custom_jvp_inside_remat_and_scan
    "scan_of_scan",  # scan_over_layers, scan_over_time
    "packed_qkv_split",  # packed_qkv_sliced
    "one_expert_of_each_layer",  # indexed_inside_a_loop
    "ragged_experts_of_each_layer",  # ragged_experts
    "factor_of_a_table_and_of_joined_weights",  # factors_of_a_weight
    "convolution_1d_depthwise",  # convolution_depthwise
    "convolution_1d_grouped_and_dilated",  # convolution_grouped, convolution_2d_dilated
    "convolution_1d",  # convolution_2d_strided
    "convolution_2d_dilated",
    "convolution_3d",  # convolution_2d_strided
    "convolution_3d_depthwise",
    "convolution_3d_grouped_and_dilated",
    "convolution_3d_transposed",  # convolution_transposed
    "convolution_transposed_kernel_reversed",
}


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_layers_are_found_and_their_rows_multiply_to_their_gradients(name):
    case = CASES[name]()
    has_aux = case.options.pop("has_aux", False)
    layers = singd_jax.find_layers(case.loss, **case.options)(case.params, *case.batch)
    assert set(layers) == case.layers, layers
    assert set(layers.others) == case.others, layers
    assert "no gradient of the loss reaches it" not in layers.others.values(), layers
    # float32; None in one case of bfloat16
    tolerance = None if name == "mixed_precision" else 2e-5
    check = singd_jax.check(case.loss, layers, tolerance=tolerance, has_aux=has_aux)
    gaps = check(case.params, *case.batch)
    assert set(gaps) == case.layers


def depthwise(x, w):
    numbers = ("NCW", "OIW", "NCW")
    return jax.lax.conv_general_dilated(
        jnp.tile(x[..., None], (1, 4, 3)),
        w,
        (1,),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=4,
    )


ONE_BY_ONE = {
    "dense": (lambda x, w: x @ w, (1, 1)),
    "weight_first": (lambda x, w: (w @ x.T).T, (1, 1)),
    "also_transposed": (lambda x, w: jnp.tanh(x @ w) @ w.T, (1, 1)),
    "experts": (jax.vmap(jnp.matmul, (None, 0), 1), (3, 1, 1)),
    "scan": (lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0], (3, 1, 1)),
    "depthwise": (depthwise, (4, 1, 1)),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_matrices_of_one_number_have_their_rows(name):
    product, shape = ONE_BY_ONE[name]

    def loss(p, x):
        return mean_square(product(x, p["w"]) + p["b"])

    params, x = {"w": array(*shape), "b": array(1)}, array(N, 1)
    layers = singd_jax.find_layers(loss)(params, x)
    assert set(layers) == {"w"}
    assert singd_jax.check(loss, layers)(params, x)["w"] < 1e-5


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


@pytest.mark.parametrize(("kfac_approx", "told"), [("reduce", True), ("expand", False)])
def test_the_table_tells_that_the_axis_of_the_batch_is_a_guess(kfac_approx, told):
    def loss(p, x):  # time-major
        return mean_square((x @ p).swapaxes(0, 1))

    layers = singd_jax.find_layers(loss, kfac_approx=kfac_approx)(array(4, 3), array(N, N, 4))
    guess = "several axes are as long as the batch: the first was taken for it"
    assert layers["params"].notes == ((guess,) if told else ())


def test_a_difference_beyond_rounding_is_told_with_the_dtype():
    def loss(p, x):
        return mean_square((x @ p["w"].astype(x.dtype)).astype(jnp.float32))

    params, x = {"w": array(4, 3)}, X.astype(jnp.bfloat16)
    layers = singd_jax.find_layers(loss)(params, x)
    assert 1e-4 < singd_jax.check(loss, layers)(params, x)["w"] < 8 * 2.0**-7
    with pytest.raises(AssertionError, match=r"bug in singd_jax: w \(0.* in bfloat16"):
        singd_jax.check(loss, layers, tolerance=1e-6)(params, x)


@pytest.mark.parametrize("back", [jnp.bfloat16, jnp.float32])
def test_a_gradient_that_is_rounded_where_its_weight_is_cast_is_no_difference(back):
    def loss(p, x):
        v, w = (p[name].astype(jnp.bfloat16).astype(back) for name in "vw")
        return mean_square(jnp.tanh(x @ v) @ jnp.concatenate([w, w], 1))

    params = {"v": array(4, 4), "w": array(4, 3)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert 1e-4 < max(singd_jax.check(loss, layers)(params, X).values()) < 8 * 2.0**-7


def test_python_numbers_are_listed_and_the_remedy_told():
    case = CASES["python_number"]()
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    assert str(layers).splitlines()[-1].split("  ")[-1] == (
        "a Python number, not an array: not trained"
    )
    assert "AdamW" not in str(layers)
    tx = singd_jax.singd(layers=layers)
    state = tx.init(case.params)
    grads = jax.grad(case.loss, allow_int=True)(case.params | {"n": jnp.ones(())}, *case.batch)
    for use in (tx.init, lambda grads: tx.update(grads, state, case.params, curvature=None)):
        with pytest.raises(ValueError, match=r"'s' was a Python number .*make it jnp\.asarray"):
            use(grads | {"n": 3})


def test_equal_layers_are_one_static_argument():
    case = CASES["equinox_mlp"]()
    traced = []

    @eqx.filter_jit
    def step(model, state, layers, x):
        traced.append(layers)
        return singd_jax.value_and_curvature(case.loss, layers)(model, state, x)[0]

    find = singd_jax.find_layers(case.loss)
    layers = find(case.params, X)
    state = singd_jax.singd(layers=layers).init(case.params)
    summed = singd_jax.find_layers(case.loss, loss_average=None)(case.params, X)
    for same in (layers, find(case.params, X), summed):
        step(case.params, state, same, X)
    assert traced == [layers, summed]


def test_a_value_is_part_of_a_name_unless_it_is_all_of_its_branch():
    class Attention(NamedTuple):
        query: Any
        value: Any

    def loss(p, x):
        return mean_square(x @ p["a"].query * (x @ p["a"].value) + x @ p["value"])

    params = {"a": Attention(array(4, 3), array(4, 3, seed=1)), "value": array(4, 3, seed=2)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert set(layers) == {"a.query", "a.value", "value"}
