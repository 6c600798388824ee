"""The rows of transposed convolutions: their products are gradients, on every library."""

from typing import Any

import pytest
import torch

from singd_core import TransposedConvolution

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "1d": ({"kernel_size": (3,)}, (4, 8)),
    "2d, stride": ({"kernel_size": (3, 2), "stride": (2, 3)}, (4, 3, 4)),
    "3d": ({"kernel_size": (2, 1, 3), "padding": (1, 0, 1)}, (2, 3, 2, 4)),
    "dilation": ({"kernel_size": (3, 3), "stride": 2, "padding": 1, "dilation": 2}, (4, 3, 4)),
    "groups": ({"kernel_size": (3, 2), "stride": (2, 1), "groups": 2}, (4, 3, 4)),
    "depthwise": ({"kernel_size": (3,), "stride": 2, "padding": 1, "groups": 4}, (4, 5)),
}


def gradient(arguments: dict[str, Any], x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """∂⟨g, z⟩ / ∂W as torch computes it."""
    layer = getattr(torch.nn, f"ConvTranspose{x.ndim - 2}d")(
        x.shape[1], g.shape[1], bias=False, dtype=x.dtype, **arguments
    )
    (layer(x) * g).sum().backward()
    found: torch.Tensor = layer.weight.grad
    return found


def drawn(arguments: dict[str, Any], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, *shape, dtype=torch.float64)
    kind = getattr(torch.nn, f"ConvTranspose{len(shape) - 1}d")
    layer = kind(shape[0], 3 * arguments.get("groups", 1), **arguments).double()
    return x, torch.randn_like(layer(x))


@pytest.mark.parametrize("case", CASES)
def test_rows_multiply_to_the_gradient(case: str, backend: Any) -> None:
    arguments, shape = CASES[case]
    x, g = drawn(arguments, shape)
    W, kind = gradient(arguments, x, g), TransposedConvolution(**arguments)
    A, N = kind.inputs(backend.array(x.numpy()), bias=False, kfac_approx="expand")
    B, M = kind.outputs(backend.array(g.numpy()), kfac_approx="expand", loss_average="batch")
    positions = shape[1:]
    assert (5 * torch.Size(positions).numel(), 5) == (N, M)
    product, expected = torch.tensor(backend.numpy(B.mT @ A)), kind.matrix(W)
    assert (product - expected).abs().max() <= backend.tolerance * expected.abs().max()
    weight, bias = kind.split(kind.matrix(W), tuple(W.shape), bias=False)
    assert bias is None
    assert torch.equal(weight, W)
    groups, *sides = kind.shape(tuple(W.shape), bias=False)
    assert (*groups, *sides) == tuple(kind.matrix(W).shape)


@pytest.mark.parametrize("case", CASES)
def test_reduced_rows_are_the_mean_input_and_the_sum_of_gradients(case: str) -> None:
    arguments, shape = CASES[case]
    x, g = drawn(arguments, shape)
    kind = TransposedConvolution(**arguments)
    A, N = kind.inputs(x, bias=False, kfac_approx="reduce")
    B, M = kind.outputs(g, kfac_approx="reduce", loss_average="batch+sequence")
    all_A, all_N = kind.inputs(x, bias=False, kfac_approx="expand")
    all_B, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
    assert (5, all_N) == (N, M)
    torch.testing.assert_close(A, all_A.unflatten(-2, (5, -1)).mean(-2))
    torch.testing.assert_close(B, all_B.unflatten(-2, (5, -1)).sum(-2))


def test_a_bias_is_refused() -> None:
    kind = TransposedConvolution((3,))
    with pytest.raises(ValueError, match="the bias of a transposed convolution is no column"):
        kind.inputs(torch.ones(2, 4, 5), bias=True, kfac_approx="expand")
    with pytest.raises(ValueError, match="the bias of a transposed convolution is no column"):
        kind.shape((4, 3, 3), bias=True)
