"""Weights without rows and the biases that names tell: several processes do as one."""

import copy
from typing import Any

import gloo
import models
import pytest
import torch.distributed as dist
from test_fully_shard import check, shard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD


def run(rank: int, world: int, how: str, structures: str | None) -> dict[str, Tensor]:
    """The weights after training with a checkpoint in between."""
    model: Any = models.new("convolutions")
    if how == "fully_shard" and world > 1:
        model = shard(model, init_device_mesh("cpu", (world,)))
    elif world > 1:
        model = DistributedDataParallel(model)
    given: dict[str, Any] = {"structures": structures, "T": 2, "growing_T": False}
    if how == "copies" and world > 1:
        given |= {"shard": True, "processes": dist.group.WORLD}

    def build() -> SINGD:
        return SINGD(model.named_parameters(), **given)

    optimizer = build()
    assert repr(optimizer).count(".weight + bias") > 1
    for i, batch in enumerate(models.data("convolutions", 7)):
        if i == 4:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build()
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        models.loss(model, *models.part_of(batch, rank, world)).backward()
        optimizer.step()
    return models.weights(getattr(model, "module", model))


@pytest.mark.parametrize("structures", [None, "diagonal"])
@pytest.mark.parametrize("how", ["fully_shard", "copies"])
def test_two_processes_do_as_one(how: str, structures: str | None) -> None:
    check(gloo.run(2, run, how, structures), run(0, 1, how, structures))
