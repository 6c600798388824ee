"""The rows are the layer's: their products are what automatic differentiation gives."""

import math

import numpy as np
import pytest
import torch
from curvature_cases import CASES, Case

from singd_core.layers import Convolution, LayerKind, Linear

# torch's, once, wherever it comes first
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

# Two float64 sums of at most some hundred products in a different order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def check_gradient(kind: LayerKind, module: torch.nn.Module, x: torch.Tensor) -> None:
    """`Bᵀ A` of the expanded rows is the gradient in matrix form, for every group."""
    bias = module.bias is not None
    y = module(x)
    g = torch.randn_like(y)
    parameters = [module.weight, module.bias] if bias else [module.weight]
    gradients = torch.autograd.grad(y, parameters, g)
    A, N = kind.inputs(x, bias=bias, kfac_approx="expand")
    B, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
    batch, d_out, d_in = kind.shape(module.weight.shape, bias)
    assert A.shape == (*batch, N, d_in)
    assert B.shape == (*batch, N, d_out)
    torch.testing.assert_close(B.mT @ A, kind.matrix(*gradients), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (3, 4, 2), (2, 3, 1, 4)])
def test_linear_rows_give_the_weight_gradient(shape: tuple[int, ...], bias: bool) -> None:
    module = torch.nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    check_gradient(Linear(), module, torch.randn(*shape, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_convolution_rows_give_the_weight_gradient(name: str) -> None:
    case = CASES[name]
    check_gradient(case.kind(), case.module(), torch.randn(3, *case.shape, dtype=torch.float64))


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("average_groups", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_diagonal_rows_have_the_diagonal_of_the_rows(
    name: str, average_groups: bool, kfac_approx: str
) -> None:
    case = CASES[name]
    kind, x = case.kind(average_groups=average_groups), torch.randn(3, *case.shape).double()
    A, N = kind.inputs(x, bias=case.bias, kfac_approx=kfac_approx)
    B, M = kind.diagonal_rows(x, bias=case.bias, kfac_approx=kfac_approx)
    assert N == M
    torch.testing.assert_close(B.square().sum(-2), A.square().sum(-2), **EXACT)


@pytest.mark.parametrize("name", ["2d", "groups", "no bias", "depthwise"])
def test_matrix_and_split_take_stacks_of_layers(name: str) -> None:
    case = CASES[name]
    modules = [case.module() for _ in range(3)]
    weights = torch.stack([module.weight for module in modules])
    biases = torch.stack([module.bias for module in modules]) if case.bias else None
    matrices = case.kind().matrix(weights, biases)
    each = [case.kind().matrix(module.weight, module.bias) for module in modules]
    assert torch.equal(matrices, torch.stack(each))
    weight, bias = case.kind().split(matrices, modules[0].weight.shape, case.bias)
    assert torch.equal(weight, weights)
    assert bias is None if biases is None else torch.equal(bias, biases)


def test_a_convolution_without_batch_axis_is_a_batch_of_one() -> None:
    case = CASES["groups"]
    check_gradient(case.kind(), case.module(), torch.randn(*case.shape, dtype=torch.float64))


def test_channels_last_memory_gives_the_same_rows() -> None:
    case = CASES["2d"]
    x = torch.randn(3, *case.shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    check_gradient(case.kind(), case.module().to(memory_format=torch.channels_last), x)


def test_padding_may_differ_before_and_after() -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    A, _ = Convolution((3, 2), padding=((0, 2), (1, 0))).inputs(x, bias=True, kfac_approx="expand")
    padded = torch.nn.functional.pad(x, (1, 0, 0, 2))
    expected, _ = Convolution((3, 2)).inputs(padded, bias=True, kfac_approx="expand")
    torch.testing.assert_close(A, expected, rtol=0, atol=0)
    A, _ = Convolution((3, 2), padding=((0, 2), (1, 0))).inputs(x, bias=True, kfac_approx="reduce")
    expected, _ = Convolution((3, 2)).inputs(padded, bias=True, kfac_approx="reduce")
    torch.testing.assert_close(A, expected, **EXACT)


def by_sample(rows: np.ndarray, batch: int) -> np.ndarray:
    """(*groups, batch · shared, d) as (*groups, batch, shared, d)."""
    *groups, n, d = rows.shape
    return rows.reshape(*groups, batch, n // batch, d)


def check_reduce(kind: LayerKind, x: np.ndarray, g: np.ndarray, bias: bool) -> None:
    """Reduced inputs are means of the expanded rows of a sample, reduced outputs are sums."""
    A, N = kind.inputs(x, bias=bias, kfac_approx="reduce")
    expanded, _ = kind.inputs(x, bias=bias, kfac_approx="expand")
    assert N == A.shape[-2] == x.shape[0]
    np.testing.assert_allclose(A, by_sample(expanded, N).mean(-2), **EXACT)
    B, _ = kind.outputs(g, kfac_approx="reduce", loss_average=None)
    expanded, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
    np.testing.assert_allclose(B, by_sample(expanded, N).sum(-2), **EXACT)


@pytest.mark.parametrize("shape", [(7,), (7, 5), (3, 4, 2)])
def test_reduce_of_linear_is_mean_and_sum_over_the_shared_axes(
    shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(*shape, 6)), rng.normal(size=(*shape, 4))
    check_reduce(Linear(), x, g, bias=True)


@pytest.mark.parametrize("average_groups", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_reduce_of_convolution_is_mean_and_sum_over_the_positions(
    name: str, average_groups: bool, rng: np.random.Generator
) -> None:
    case: Case = CASES[name]
    x = rng.normal(size=(3, *case.shape))
    g = rng.normal(size=case.module()(torch.asarray(x)).shape)
    check_reduce(case.kind(average_groups=average_groups), x, g, case.bias)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_the_loss_terms_follow_what_the_loss_is_a_mean_over(kfac_approx: str) -> None:
    for kind, g, shared in [
        (Linear(), np.ones((5, 4)), ()),
        (Linear(), np.ones((5, 2, 3, 4)), (2, 3)),
        (Convolution((3, 3)), np.ones((5, 4, 2, 3)), (2, 3)),
        (Convolution((3,), groups=2), np.ones((5, 4, 7)), (7,)),
    ]:
        terms = [
            kind.outputs(g, kfac_approx=kfac_approx, loss_average=average)[1]
            for average in (None, "batch", "batch+sequence")
        ]
        assert terms == [1, 5, 5 * math.prod(shared)]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_has_rows_of_the_right_width(name: str, kfac_approx: str) -> None:
    case = CASES[name]
    kind = case.kind()
    A, N = kind.inputs(np.ones((0, *case.shape)), bias=True, kfac_approx=kfac_approx)
    g = np.ones((0, 4, *case.shape[1:]))
    B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average="batch")
    assert (A.shape[-2:], N, B.shape[-2], M) == ((0, case.patch + 1), 0, 0, 0)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_an_empty_batch_of_a_linear_layer_has_rows_of_the_right_width(kfac_approx: str) -> None:
    A, N = Linear().inputs(np.ones((0, 5, 3)), bias=True, kfac_approx=kfac_approx)
    B, M = Linear().outputs(np.ones((0, 5, 2)), kfac_approx=kfac_approx, loss_average="batch")
    assert (A.shape, N, B.shape, M) == ((0, 4), 0, (0, 2), 0)
