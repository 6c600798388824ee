"""What one process has of a state that is parted is no state of a whole model."""

import copy
from pathlib import Path

import gloo
import models
import pytest
import torch
from runs import NAME, Run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from singd_torch import SINGD


def save_one_part(rank: int, world: int, folder: str) -> None:
    run = Run(rank, world)
    optimizer = run.build()
    models.train(run.model, optimizer, models.data(NAME)[:2], rank, world)
    state = optimizer.state_dict()  # all processes call it
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")


def load_it(rank: int, world: int, folder: str) -> None:
    state = torch.load(f"{folder}/state.pt", weights_only=False)
    optimizer = SINGD(models.new(NAME), **models.settings(NAME))
    with pytest.raises(ValueError, match=r"is one process's part .*full_state_dict=True"):
        optimizer.load_state_dict(state)


def test_one_process_cannot_go_on_from_the_part_of_another(tmp_path: Path) -> None:
    gloo.run(2, save_one_part, str(tmp_path))
    gloo.run(2, load_it, str(tmp_path))


def train_alone_on_a_mesh(rank: int, world: int) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    x = torch.randn(9, 6).double()
    for own in (model, twin):
        optimizer = SINGD(own)
        for _ in range(4):
            optimizer.zero_grad()
            own(x).square().mean().backward()
            optimizer.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(float((p.full_tensor() - q).abs().max()) for p, q in pairs)


def test_one_process_may_have_a_model_in_one_part() -> None:
    assert gloo.run(1, train_alone_on_a_mesh)[0] < 1e-12
