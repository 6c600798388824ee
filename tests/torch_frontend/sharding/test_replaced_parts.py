"""What is replaced in a model in parts is let go."""

import gc
import weakref
from typing import Any

import gloo
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from singd_torch import SINGD


def head(mesh: DeviceMesh) -> nn.Module:
    made = nn.Linear(6, 4)
    fully_shard(made, mesh=mesh)
    return made


def step(model: nn.Module, optimizer: SINGD) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()


def replacing(rank: int, world: int) -> list[int]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), head(mesh))
    fully_shard(model, mesh=mesh)
    optimizer = SINGD(model)
    gone: list[list[weakref.ref[Any]]] = []
    for _ in range(4):
        step(model, optimizer)
        gone.append([weakref.ref(one) for one in (model[2], *model[2].parameters())])
        for p in model[2].parameters():
            optimizer.state.pop(p, None)
        del p
        model[2] = head(mesh)
        optimizer.param_groups[0]["params"][2:] = model[2].parameters()
    step(model, optimizer)
    gc.collect()
    # the root of fully_shard keeps what it had before its first forward pass
    return [sum(one() is not None for one in each) for each in gone[1:]]


def test_heads_that_are_replaced_are_let_go() -> None:
    assert gloo.run(2, replacing) == [[0, 0, 0]] * 2
