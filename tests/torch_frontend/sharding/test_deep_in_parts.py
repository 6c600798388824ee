"""Processes that step some matrices each share the size of steps as one process does (5.10b)."""

import copy

import gloo
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from singd_torch import SINGD


def train(model: nn.Module, rank: int, world: int) -> list[torch.Tensor]:
    optimizer = SINGD(model, warmup=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x[rank::world]).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def deep(rank: int, world: int) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6, dtype=torch.float64) for _ in range(16)])
    alone = train(copy.deepcopy(model), 0, 1)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    pairs = zip(train(model, rank, world), alone, strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def test_two_processes_count_all_matrices() -> None:
    assert max(gloo.run(2, deep)) < 1e-12
