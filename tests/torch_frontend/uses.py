"""Small models that use their layers in some way, and a loss of what they return."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def loss_of(z: Tensor) -> Tensor:
    return (torch.sin(z) - 0.3).square().mean()


class Does(nn.Module):
    """A module that does what a function says with its layers."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = call

    def forward(self, *args: Any) -> Tensor:
        return self.call(self, *args)


def ids() -> Tensor:
    return torch.arange(12).reshape(4, 3) % 9


def tables(head: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        return head(torch.tanh(m.inner(m.table(x))), m.table.weight)

    return Does(call, table=nn.Embedding(9, 4), inner=nn.Linear(4, 4))
