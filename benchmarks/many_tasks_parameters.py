"""Tasks of `many.py` whose weights are no plain layers: points, splats, adapters, signs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from many_tasks_common import Task, all_digits, fitted, fixed, some_digits
from many_tasks_fields import picture
from many_tasks_images import classified
from noisy import Build, network
from torch import Tensor, nn


class Splats(nn.Module):
    """Forty soft spots of an image: where, how wide, how bright."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(2.0 * torch.rand(40, 2) - 1.0)
        self.width, self.light = (
            nn.Parameter(torch.full((40,), -2.0)),
            nn.Parameter(torch.zeros(40)),
        )

    def forward(self, places: Tensor) -> Tensor:
        apart = (places[:, None] - self.at).square().sum(-1)
        return ((-apart / self.width.exp().square()).exp() * self.light).sum(1)


def splats(build: Build, steps: int) -> float:
    """An image as a sum of forty soft spots."""
    model, (x, y) = Splats(), picture()
    return fitted(build, model, steps, lambda: F.mse_loss(model(x[::2]), y[::2, 0]))


class Points(nn.Module):
    """A point of the plane for each of some things."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.at = nn.Parameter(0.1 * torch.randn(n, 2))

    def forward(self) -> Tensor:
        """The logarithms of how near each pair is, as t-SNE has them."""
        near = (1.0 + (self.at[:, None] - self.at).square().sum(-1)).reciprocal()
        near = near * (1.0 - torch.eye(len(near)))
        return (near / near.sum() + 1e-12).log()


def neighbours(build: Build, steps: int) -> float:
    """t-SNE of 200 digits: the divergence of what is near."""
    x = all_digits()[0][:200]
    model, apart = Points(len(x)), torch.cdist(x, x).square()
    near = (-apart / 2.0).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf).softmax(1)
    wanted = (near + near.T) / (2.0 * len(x))
    known = (wanted + 1e-12).log()
    return fitted(build, model, steps, lambda: (wanted * (known - model())).sum())


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what two narrow matrices add to it."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def adapters(build: Build, steps: int) -> float:
    """Adapters of low rank (LoRA) for digits whose pixels were shuffled after a training."""
    model = network(64, 64, 64, 10, activation=nn.ReLU)
    first = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        x, y = some_digits(64)
        first.zero_grad()
        F.cross_entropy(model(x), y).backward()
        first.step()
    first.zero_grad()
    adapted = nn.Sequential(*(Adapted(p) if isinstance(p, nn.Linear) else p for p in model))
    order = torch.randperm(64, generator=fixed())

    def loss() -> Tensor:
        x, y = some_digits(64)
        return F.cross_entropy(adapted(x[:, order]), y)

    return fitted(build, adapted, steps, loss)


class Signs(nn.Linear):
    """A linear layer that uses the signs of its weights, times their mean size."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.detach().abs().mean()
        signs = size * self.weight.detach().sign()
        return F.linear(x, self.weight + (signs - self.weight).detach(), self.bias)


def signs(build: Build, steps: int) -> float:
    """Weights of one bit, with the gradient of full ones."""
    hidden = [part for _ in range(2) for part in (Signs(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    return classified(build, steps, nn.Sequential(*hidden, nn.Linear(64, 10)))


TASKS = {
    "splats": Task("image of soft spots", splats, 500),
    "neighbours": Task("t-SNE of digits", neighbours, 400),
    "adapters": Task("adapters of low rank", adapters, 500),
    "signs": Task("weights of one bit", signs, 500),
}
