"""The authors' `singd` 0.0.5 has the same scaled rows, wherever it supports the layer."""

from math import sqrt

import pytest
import torch
from curvature_cases import PLAIN

from singd_core.layers import LayerKind, Linear

utils = pytest.importorskip("singd.optim.utils")

# Averages over positions are products with an averaging matrix there and here, in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}
# singd knows 2d convolutions, with zeros padded equally on both sides, only.
SUPPORTED = [
    name
    for name, case in PLAIN.items()
    if len(case.shape) == 3 and not name.startswith("same, even")
]


def check_rows(kind: LayerKind, module: torch.nn.Module, x: torch.Tensor, approx: str) -> None:
    y = module(x).detach()
    A, N = kind.inputs(x, bias=module.bias is not None, kfac_approx=approx)
    theirs = utils.process_input(x.clone(), module, approx)
    torch.testing.assert_close(A / sqrt(N), theirs, **CLOSE)
    g = torch.randn_like(y)
    for average in (None, "batch", "batch+sequence"):
        B, M = kind.outputs(g, kfac_approx=approx, loss_average=average)
        theirs = utils.process_grad_output(g.clone(), module, average, approx)
        torch.testing.assert_close(B * sqrt(M), theirs, **CLOSE)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(7,), (7, 5), (3, 4, 2)])
def test_linear_rows_equal_the_authors(shape: tuple[int, ...], approx: str) -> None:
    module = torch.nn.Linear(6, 4, dtype=torch.float64)
    check_rows(Linear(), module, torch.randn(*shape, 6, dtype=torch.float64), approx)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_convolution_rows_with_averaged_groups_equal_the_authors(name: str, approx: str) -> None:
    case = PLAIN[name]
    x = torch.randn(3, *case.shape, dtype=torch.float64)
    check_rows(case.kind(average_groups=True), case.module(), x, approx)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", [n for n in SUPPORTED if "groups" not in PLAIN[n].arguments])
def test_convolution_rows_without_groups_equal_the_authors(name: str, approx: str) -> None:
    case = PLAIN[name]
    x = torch.randn(3, *case.shape, dtype=torch.float64)
    check_rows(case.kind(), case.module(), x, approx)
