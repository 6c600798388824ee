"""The regression that torch tests its optimizers with, in every configuration of SINGD."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from singd_torch import SINGD

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "another rate": {"lr": 0.01},
    "tensor rate": {"lr": torch.tensor(0.05)},
    "weight decay": {"weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "diagonal": {"structures": "diagonal"},
    "paper": {"recipe": "paper", "lr": 0.01},
    "paper with weight decay": {"recipe": "paper", "lr": 0.01, "weight_decay": 0.1},
    "paper without momentum": {"recipe": "paper", "lr": 0.01, "momentum": 0.0, "T": 1},
    "kfac": {"recipe": "paper", "kfac": True, "lr": 0.01, "damping": 0.1},
}


class Regression(nn.Module):
    """ŷ = W x + b: as a layer, or of bare parameters, which AdamW trains."""

    def __init__(self, layer: bool, strided: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(10, 5, generator=g), torch.randn(10, generator=g)
        if strided:  # not contiguous
            weight, bias = (torch.stack([p, p], -1)[..., 0] for p in (weight, bias))
        if layer:
            self.layer = nn.Linear(5, 10)
            self.layer.weight, self.layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        else:
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.input = torch.randn(7, 5, generator=g)

    def forward(self) -> Tensor:
        x = self.input
        y: Tensor = self.layer(x) if hasattr(self, "layer") else x @ self.weight.mT + self.bias
        return y

    def loss(self) -> Tensor:
        return self().square().sum(1).mean()


def closure_of(model: Regression, optimizer: optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    return closure


def made(config: str, layer: bool) -> tuple[Regression, SINGD]:
    model = Regression(layer)
    return model, SINGD(model, **copy.deepcopy(CONFIGS[config]))


def stepped(config: str, layer: bool, n: int = 3) -> tuple[Regression, SINGD]:
    model, optimizer = made(config, layer)
    for _ in range(n):
        optimizer.step(closure_of(model, optimizer))
    return model, optimizer


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


every = pytest.mark.parametrize(
    ("config", "layer"),
    list(itertools.product(CONFIGS, [True, False])),
    ids=lambda value: {True: "layer", False: "bare"}.get(value, value),
)
