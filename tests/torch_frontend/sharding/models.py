"""Small models in float64 for several processes, their data, and their training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from singd_core.layers import Embedding

STEPS = 4
IMAGES = "images", "convolutions", "transposed"
Data = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, d: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.d_head = d // heads
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            each(x).view(batch, length, -1, self.d_head).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return y


class MLP(nn.Module):
    def __init__(self, d: int = 16, width: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Characters(nn.Module):
    """A transformer of two blocks; its table may be tied to the head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Images(nn.Module):
    """Convolutions, one of them grouped, and packed attention; sides that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.last = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.relu(self.first(x)))).flatten(2).mT
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        y: Tensor = self.last(torch.tanh(self.hidden(x)))
        return y


class Experts(Characters):
    """With matrices that no module calls."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 20) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        logits: Tensor = super().forward(tokens) + torch.tanh(x @ self.experts.mean(0))
        return logits


class Used(Characters):
    """With a weight that is also used in another way, which no rows tell."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = super().forward(tokens) * (1.0 + self.blocks[0].mlp.up.weight.mean())
        return logits


def convolutions() -> nn.Sequential:
    """Without attention, whose keys have a gradient of rounding alone when positions are summed."""
    first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3, 2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(20, 5))


def transposed() -> nn.Sequential:
    """A transposed convolution, whose weight has columns along its first axis."""
    first, second = nn.Conv2d(1, 6, 3, 2), nn.ConvTranspose2d(6, 3, 2, 2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(48, 5))


def new(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "characters": Characters,
        "tied": lambda: Characters(tied=True),
        "experts": Experts,
        "used": Used,
        "images": Images,
        "convolutions": convolutions,
        "transposed": transposed,
    }[name]().double()


def parts(model: Any) -> list[nn.Module]:
    """What is sharded as a unit of its own, before the whole model."""
    if isinstance(model, Characters):
        return list(model.blocks)
    return [model.second, model.hidden] if isinstance(model, Images) else [model[2]]


def data(name: str, steps: int = STEPS, batch: int = 8) -> list[Data]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        if name in IMAGES:
            x = torch.randn(batch, 1, 6, 6, generator=draw, dtype=torch.float64)
            found.append((x, torch.randint(5, (batch,), generator=draw)))
        else:
            tokens = torch.randint(20, (batch, 7), generator=draw)
            found.append((tokens[:, :-1], tokens[:, 1:]))
    return found


def settings(name: str, **given: Any) -> dict[str, Any]:
    """What the loss asks for, and factors of all rows: each process samples its own."""
    terms = "batch" if name in IMAGES else "batch+sequence"
    return {"loss_average": terms, "rows": math.inf} | given


def loss(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def part_of(batch: Data, index: int, count: int) -> Data:
    x, y = (t.tensor_split(count)[index] for t in batch)
    return x, y


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters whole; all processes call it."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@contextlib.contextmanager
def exact_counts() -> Iterator[None]:
    """Roots of counts in float64: in float32 they round otherwise for parts of a batch."""
    inputs = Embedding.inputs

    def exact(self: Embedding, x: Tensor, **given: Any) -> tuple[Tensor, int]:
        A, N = inputs(self, x, **given)
        return A.double().square().round().sqrt(), N

    with mock.patch.object(Embedding, "inputs", exact):
        yield


def train(
    model: Any, optimizer: torch.optim.Optimizer, batches: list[Data], index: int = 0, of: int = 1
) -> None:
    """A step with each batch, or with one of so many parts of it."""
    with exact_counts():
        for batch in batches:
            optimizer.zero_grad()
            loss(model, *part_of(batch, index, of)).backward()
            optimizer.step()
