"""What the step of the default recipe does not depend on, on models of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.tensors import pieces

# Relative to the largest entry, float64: scales that are no powers of two round otherwise.
CLOSE = 1e-8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)),
    ).double()


def trained(loss_of: Callable[[Tensor, Tensor], Tensor], **given: Any) -> list[Tensor]:
    model = network()
    optimizer = SINGD(model, **given)
    for step in range(6):
        torch.manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4).double(), torch.randint(3, (8,))
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    return [p.detach() for p in model.parameters()]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for p, q in zip(found, expected, strict=True):
        assert (p - q).abs().max() <= CLOSE * q.abs().max()


STRUCTURES = [None, ("dense", "dense"), ("diagonal", "diagonal"), ("triltoeplitz", "dense")]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("structures", STRUCTURES, ids=str)
def test_the_scale_of_the_loss_changes_nothing(structures: Any, scale: float) -> None:
    loss = nn.functional.cross_entropy
    expected = trained(loss, structures=structures)
    assert_alike(trained(lambda z, y: loss(z, y) * scale, structures=structures), expected)


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
def test_nor_does_a_sum_or_what_the_loss_is_said_to_be_a_mean_of(loss_average: str | None) -> None:
    expected = trained(nn.functional.cross_entropy)
    found = trained(
        lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum"), loss_average=loss_average
    )
    assert_alike(found, expected)


@pytest.mark.parametrize("structures", STRUCTURES, ids=str)
def test_a_dead_layer_stays_where_it_is(structures: Any) -> None:
    model = network()
    optimizer = SINGD(model, structures=structures)
    for step in range(40):
        torch.manual_seed(step)
        x, y = torch.randn(8, 2, 4, 4).double(), torch.randint(3, (8,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss if step < 5 else loss * 0.0).backward()
        if step == 5:
            before = copy.deepcopy(model)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before.parameters()))


@pytest.mark.parametrize("masked", [False, True], ids=["host", "masked"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize(("before", "after"), [(1e-15, 1e3), (1e-18, 1e8), (1e-12, 1e12)])
def test_gradients_that_vanish_and_come_back_are_followed(
    before: float, after: float, structure: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors as large as small gradients want them must make no step overflow, nor be zero."""
    if masked:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = SINGD(model, structures=(structure, structure))
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        x = torch.randn(32, 6)
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        (loss * (before if step < 3 else after)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.skipped == 0
    assert sum(losses[-5:]) < 0.7 * sum(losses[3:8])


def test_gradients_may_fade_to_nothing() -> None:
    """What divides by their norms stays in the range of float32."""
    torch.manual_seed(0)
    model = nn.Linear(6, 700)
    optimizer = SINGD(model, T=1, momentum=0.0)
    for step in range(100):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 10.0 ** -max(0, step // 2 - 5)
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("others", "frozen", "share"), [(0, 0, 1.0), (23, 0, 0.5), (23, 12, 1.0), (29, 12, 2 / 3)]
)
def test_many_trained_matrices_share_the_size_of_their_steps(
    others: int, frozen: int, share: float
) -> None:
    """Equation (5.10b); frozen ones do not count, and a stack of experts counts once."""

    def moved(others: int, frozen: int) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))
        weight.grad = torch.randn(3, 4, 5, dtype=torch.float64)
        more = [nn.Parameter(torch.randn(4, 5, dtype=torch.float64)) for _ in range(others)]
        for p in more:
            p.grad = torch.randn_like(p)
        optimizer = SINGD([weight, *more], warmup=0)
        for p in more[:frozen]:
            p.requires_grad_(False)
            p.grad = None
        before = weight.detach().clone()
        optimizer.step()
        return weight.detach() - before

    assert torch.allclose(moved(others, frozen), share * moved(0, 0), rtol=1e-9)
