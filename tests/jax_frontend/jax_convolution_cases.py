"""Losses with convolutions."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax_cases import IMAGES, SEQUENCE, Case, N, array, case, mean_square


def convolution_case(kernel, x, bias=True, **how) -> Case:
    spatial = "DHW"[3 - (x.ndim - 2) :]
    how = {"window_strides": (1,) * len(spatial), "padding": "SAME"} | how
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def loss(p, x):
        y = lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **how)
        return mean_square(y + p["b"] if bias else y)

    params = {"w": array(*kernel)} | ({"b": array(kernel[-1])} if bias else {})
    return Case(loss, params, (x,), {"w"})


@case
def convolution_1d() -> Case:
    return convolution_case((3, 4, 5), SEQUENCE, padding=[(2, 0)])  # causal


@case
def convolution_2d_strided() -> Case:
    return convolution_case((3, 2, 2, 3), IMAGES, window_strides=(2, 1))


@case
def convolution_2d_dilated() -> Case:
    return convolution_case((2, 2, 2, 3), IMAGES, rhs_dilation=(1, 2), padding="VALID", bias=False)


@case
def convolution_3d() -> Case:
    return convolution_case((2, 1, 2, 2, 3), array(N, 3, 3, 4, 2))


@case
def convolution_grouped() -> Case:
    return convolution_case((3, 3, 2, 6), array(N, 4, 4, 4), feature_group_count=2)


@case
def convolution_depthwise() -> Case:
    return convolution_case((3, 3, 1, 4), array(N, 4, 4, 4), feature_group_count=4)


@case
def convolution_1d_grouped_and_dilated() -> Case:
    return convolution_case((2, 2, 6), array(N, 5, 4), feature_group_count=2, rhs_dilation=(2,))


@case
def convolution_1d_depthwise() -> Case:
    return convolution_case((2, 1, 4), SEQUENCE, feature_group_count=4)


@case
def convolution_3d_grouped_and_dilated() -> Case:
    how = {"feature_group_count": 2, "rhs_dilation": (1, 2, 1), "window_strides": (2, 1, 1)}
    return convolution_case((2, 2, 1, 1, 4), array(N, 3, 4, 2, 2), **how)


@case
def convolution_3d_depthwise() -> Case:
    return convolution_case((2, 1, 2, 1, 2), array(N, 2, 3, 2, 2), feature_group_count=2)


@case
def convolution_3d_transposed() -> Case:
    how = {"lhs_dilation": (2, 1, 2), "padding": [(1, 1), (0, 0), (2, 1)]}
    return convolution_case((2, 1, 2, 2, 3), array(N, 2, 2, 2, 2), **how)


@case
def convolution_transposed() -> Case:
    model = nn.ConvTranspose(3, (3, 2), strides=(2, 1))
    params = model.init(jax.random.key(0), IMAGES)

    def loss(params, x):
        return mean_square(model.apply(params, x))

    return Case(loss, params, (IMAGES,), {"params.kernel"})


@case
def convolution_transposed_kernel_reversed() -> Case:
    def loss(p, x):
        return mean_square(
            lax.conv_transpose(
                x,
                p["w"],
                (2,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                transpose_kernel=True,
            )
        )

    return Case(loss, {"w": array(3, 5, 4)}, (SEQUENCE,), {"w"})


@case
def linen_cnn() -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    model = Model()
    params = model.init(jax.random.key(0), IMAGES)

    def loss(params, x):
        return mean_square(model.apply(params, x))

    return Case(loss, params, (IMAGES,), {"params.Conv_0.kernel", "params.Dense_0.kernel"})


@case
def haiku_cnn() -> Case:
    def model(x):
        x = jnp.tanh(hk.Conv2D(3, (3, 2), stride=2)(x))
        return hk.Linear(2)(hk.LayerNorm(-1, True, True)(x.mean((1, 2))))

    transformed = hk.without_apply_rng(hk.transform(model))
    params = transformed.init(jax.random.key(0), IMAGES)

    def loss(params, x):
        return mean_square(transformed.apply(params, x))

    layers = {"conv2_d.w", "linear.w"}
    return Case(loss, params, (IMAGES,), layers, {"layer_norm.scale", "layer_norm.offset"})


@case
def linen_batch_norm() -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Conv(3, (2, 2))(x))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    model = Model()
    variables = model.init(jax.random.key(0), IMAGES)
    stats = variables["batch_stats"]

    def loss(params, stats, x):
        all_variables = {"params": params, "batch_stats": stats}
        y, new = model.apply(all_variables, x, mutable=["batch_stats"])
        return mean_square(y), new

    return Case(
        loss,
        variables["params"],
        (stats, IMAGES),
        {"Conv_0.kernel", "Dense_0.kernel"},
        {"BatchNorm_0.scale", "BatchNorm_0.bias"},
        {"batch_size": lambda stats, x: len(x), "has_aux": True},
    )


@case
def vmapped_convolutions() -> Case:
    def loss(p, x):
        def one(w, x):
            numbers = ("NWC", "WIO", "NWC")
            return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=numbers)

        return mean_square(jnp.moveaxis(jax.vmap(one, (0, None))(p["w"], x), 0, 1))

    return Case(loss, {"w": array(2, 2, 4, 3)}, (SEQUENCE,), {"w"})


def concatenated_kernels(v, w, axis: int) -> Case:
    """Two kernels that make one: beside each other in its outputs (3), or in its inputs (2)."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def loss(p, x):
        kernel = jnp.concatenate([p["v"], p["w"]], axis=axis)
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return mean_square(jnp.tanh(y))

    return Case(loss, {"v": array(*v), "w": array(*w, seed=1)}, (IMAGES,), {"v", "w"})


@case
def kernels_of_concatenated_outputs() -> Case:
    return concatenated_kernels((3, 2, 2, 3), (3, 2, 2, 1), 3)


@case
def kernels_of_concatenated_inputs() -> Case:
    return concatenated_kernels((3, 2, 1, 3), (3, 2, 1, 3), 2)


@case
def concatenated_kernels_of_one_position() -> Case:
    def loss(p, x):
        kernel = jnp.concatenate([p["v"], p["w"]], axis=3)
        return mean_square(jnp.tanh(x @ jnp.squeeze(kernel, (0, 1))))

    params = {"v": array(1, 1, 2, 3), "w": array(1, 1, 2, 2, seed=1)}
    return Case(loss, params, (IMAGES,), {"v", "w"})
