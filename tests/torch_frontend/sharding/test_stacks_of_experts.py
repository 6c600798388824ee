"""Stacks of experts in copies of a model: processes train like one that has the whole batch."""

import math
from typing import Any

import gloo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

E, D, WIDTH, CLASSES = 3, 5, 8, 4
CALLS = ["bmm", "einsum", "loop", "one process alone", "gathered"]
CALLS += ["grouped_mm"] if hasattr(F, "grouped_mm") else []  # of recent versions


class Experts(nn.Module):
    """Between two layers; what an expert sees, one that others see, or rows of its own."""

    def __init__(self, call: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.W = nn.Parameter(torch.randn(E, WIDTH, WIDTH) / WIDTH**0.5)
        self.call = call

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        z: Tensor = self.last(torch.tanh(self.routed(h, route)))
        return z

    def routed(self, h: Tensor, route: Tensor) -> Tensor:
        W = self.W
        if self.call == "bmm":
            return torch.bmm(h.expand(E, -1, -1), W).sin().mean(0)
        if self.call == "einsum":
            return torch.einsum("nd,edf->nef", h, W).sin().mean(1)
        if self.call == "gathered":
            return torch.bmm(h[:, None], W[route])[:, 0]
        if self.call == "grouped_mm":
            order = route.argsort(stable=True)
            ends = torch.bincount(route, minlength=E).cumsum(0).to(torch.int32)
            return F.grouped_mm(h[order], W, offs=ends)[order.argsort()]
        out = torch.zeros_like(h)
        for i in range(E):
            at = (route == i).nonzero()[:, 0]
            if len(at) or self.call != "one process alone":
                out = out.index_add(0, at, h[at] @ W[i])
        return out


def train(rank: int, world: int, how: str) -> dict[str, tuple[str, list[Tensor]]]:
    """The rule of the stack and all weights, for each way to call it."""
    return {call: trained(rank, world, how, call) for call in CALLS}


def trained(rank: int, world: int, how: str, call: str) -> tuple[str, list[Tensor]]:
    single = call == "grouped_mm"  # torch has it for 32 bits and less
    model = Experts(call).to(torch.float32 if single else torch.float64)
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    optimizer = SINGD(wrapped, shard=how == "parted" and world > 1, rows=math.inf, lr=0.03)
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(16, D, generator=draw, dtype=torch.float64).to(model.W.dtype)
        y = torch.randint(CLASSES, (16,), generator=draw)
        route = torch.randint(E, (16,), generator=draw)
        if call == "one process alone":  # the second process alone has the last expert
            route[:8] %= E - 1
        optimizer.zero_grad()
        own = slice(16 * rank // world, 16 * (rank + 1) // world)
        F.cross_entropy(wrapped(x[own], route[own]), y[own]).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    line = next(line for line in repr(optimizer).splitlines() if line.startswith("W "))
    return line, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "parted"])
def test_two_processes_train_like_one(how: str) -> None:
    wanted = train(0, 1, how)
    for found in gloo.run(2, train, how):
        for call, (line, weights) in found.items():
            assert ("without rows" in line) == (call == "gathered"), call
            if call == "gathered":
                assert "used by torch.Tensor.__getitem__" in line
            close = 1e-5 if call == "grouped_mm" else 1e-12
            for p, q in zip(weights, wanted[call][1], strict=True):
                assert (p - q).abs().max() <= close * q.abs().max(), call
