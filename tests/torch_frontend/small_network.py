"""A small network whose layers are of several kinds, its loss and a step."""

import torch
from torch import Tensor, nn

from singd_torch import SINGD

INF, NAN = float("inf"), float("nan")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2),
        nn.Flatten(), nn.Linear(9, 3),
    )  # fmt: skip


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), torch.arange(len(x)) % 3)


def step(model: nn.Module, optimizer: SINGD, x: Tensor | None = None) -> None:
    optimizer.zero_grad()
    loss_of(model, torch.randn(9, 6) if x is None else x).backward()
    optimizer.step()


def everything(model: nn.Module, optimizer: SINGD) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} | {k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
