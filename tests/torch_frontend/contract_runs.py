"""A network with parameters of every kind, and a step of its optimizer."""

from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Layers, and parameters of every kind that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(5, 5, 3, padding=1, groups=5)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.embed(x)) + self.shift).mean(1)
        return self.out(torch.tanh(self.hidden(x)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (12, 5)), torch.randint(3, (12,))


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return nn.functional.cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor] | None = None) -> None:
    optimizer.zero_grad()
    loss_of(model, data or batch()).backward()
    optimizer.step()


def moved(model: nn.Module, before: nn.Module) -> dict[str, float]:
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    return {name: (p - q).abs().max().item() for (name, p), q in pairs}
