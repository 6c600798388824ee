"""Under autocast an accelerator multiplies with the factors in bfloat16, as the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from watched import Products

from singd_torch import SINGD
from singd_torch.tensors import pieces


def train(*, autocast: bool, **given: Any) -> tuple[SINGD, list[Any], list[Products]]:
    """The optimizer, the last change of each parameter, and the products of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = SINGD(model, T=2, growing_T=False, **given)
    moved: list[Any] = []
    products: list[Products] = []
    for _ in range(8):
        x = torch.randn(32, 20)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(x).float() - x[:, :4].sin()).square().mean()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        with Products(least=1) as own:
            optimizer.step()
        products.append(own)
        moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    return optimizer, moved, products


@pytest.fixture(autouse=True)
def _masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    monkeypatch.setattr("singd_torch.layers.layer.on_host", lambda x: False)


def test_products_are_in_bfloat16_under_autocast_and_factors_are_not() -> None:
    optimizer, _, products = train(autocast=True)
    for refresh, other in zip(products[::2], products[1::2], strict=True):
        assert refresh.dtypes[torch.bfloat16] >= 12  # of rows twice, and of gradients
        assert refresh.dtypes[torch.float32] > 0  # of a factor and its direction
        assert other.dtypes[torch.bfloat16] >= 6
        assert other.dtypes[torch.float32] <= 6  # of squares, which tell levels
    state = [v for own in optimizer.state.values() for v in own.values()]
    assert {v.dtype for v in state} == {torch.float32}
    _, _, products = train(autocast=False)
    assert {dtype for own in products for dtype in own.dtypes} == {torch.float32}


def test_a_dtype_that_is_given_is_that_of_the_products() -> None:
    given = torch.float32, torch.float32
    _, _, products = train(autocast=True, preconditioner_dtype=given)
    assert {dtype for own in products for dtype in own.dtypes} == {torch.float32}


@pytest.mark.parametrize("structures", ["dense", "blockdiagonal:4", "diagonal", "triltoeplitz"])
def test_steps_are_those_of_exact_products_to_rounding(structures: str) -> None:
    given = torch.float32, torch.float32
    _, exact, _ = train(autocast=True, structures=structures, preconditioner_dtype=given)
    _, ours, _ = train(autocast=True, structures=structures)
    for a, b in zip(ours, exact, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 0.05 * torch.linalg.vector_norm(b)
