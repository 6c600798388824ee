"""Layers and data that come in turns, and runs that go on from what was saved in between."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD

STEPS = 400


def _refreshes(optimizer: SINGD, weight: Tensor) -> float:
    return float(optimizer.state[weight]["averages.k"].sum())


@pytest.mark.parametrize("structures", ["dense", "diagonal"])
def test_networks_that_step_in_turns_have_the_same_share_of_the_refreshes(structures: str) -> None:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
    optimizer, x = SINGD(heads, structures=structures), torch.randn(16, 5)
    early = [0.0, 0.0]
    for step in range(STEPS):
        optimizer.zero_grad()
        (heads[step % 2](x) - 1.0).square().mean().backward()
        optimizer.step()
        if step == STEPS // 2 - 1:
            early = [_refreshes(optimizer, head.weight) for head in heads]
    late = [_refreshes(optimizer, h.weight) - k for h, k in zip(heads, early, strict=True)]
    assert min(late) >= 3.0
    assert abs(late[0] - late[1]) <= 2.0


class _Physics(nn.Module):
    """The loss has a derivative of the first layers, whose rows do not tell the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor, share: float) -> Tensor:
        x = x.requires_grad_()
        u = self.last(self.net(x))
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (u - x.sin()).square().mean() + share * (du - x.cos()).square().mean()


def _train(model: nn.Module, optimizer: SINGD, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.linspace(-1.0, 1.0, 16)[:, None]
        # other terms of the loss grow: layers part with their rows at a later step
        loss = model(x, min(1.0, 0.02 * step**2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _start() -> tuple[nn.Module, SINGD]:
    torch.manual_seed(1)
    model = _Physics()
    return model, SINGD(model)


def _loaded(saved: dict[str, Any]) -> tuple[nn.Module, SINGD]:
    model, optimizer = _start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("how", ["loaded", "copied", "rolled back"])
@pytest.mark.filterwarnings("ignore:no rows of")
def test_a_run_that_goes_on_compares_rows_with_gradients_in_the_same_steps(how: str) -> None:
    expected = _train(*_start(), range(30))
    lost = False
    for at in range(12):
        model, optimizer = _start()
        _train(model, optimizer, range(at))
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if how == "loaded":
            model, optimizer = _loaded(saved)
        elif how == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        else:
            _train(model, optimizer, range(at, at + 9))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        assert _train(model, optimizer, range(at, 30)) == expected[at:], at
        lost = lost or "no rows" in str(optimizer) or "without rows" in str(optimizer)
    assert lost
