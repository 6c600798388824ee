"""Layers of which no rows are seen, until they are: several processes do as one."""

import copy
import warnings
from typing import Any

import gloo
import models
import pytest
from test_fully_shard import check, shard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD


def build(rank: int, world: int, how: str) -> tuple[Any, SINGD]:
    model: Any = models.new("convolutions")
    if how == "fully_shard":
        model = shard(model, init_device_mesh("cpu", (world,)))
    elif how != "alone":
        model = DistributedDataParallel(model)
    return model, fresh(model, how)


def fresh(model: Any, how: str) -> SINGD:
    shard_state = how == "copies that part the state"
    return SINGD(model, shard=shard_state, **models.settings("convolutions"))


def train(model: Any, optimizer: SINGD, batches: Any, rank: int, world: int, seen: bool) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss = models.loss(model, *models.part_of(batch, rank, world))
        if seen:
            loss.backward()
        else:
            with optimizer.no_rows():
                loss.backward()
        optimizer.step()


def run(rank: int, world: int, how: str) -> tuple[dict[str, Tensor], int, int]:
    """The weights, and how many layers were without rows in the end and in between."""
    model, optimizer = build(rank, world, how)
    batches = models.data("convolutions", 9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no rows of .* have been seen")
        train(model, optimizer, batches[:3], rank, world, False)
        between = repr(optimizer).count("SINGD without rows")
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = fresh(model, how)
        optimizer.load_state_dict(state)
        assert repr(optimizer).count("SINGD without rows") == between
        train(model, optimizer, batches[3:5], rank, world, False)
        train(model, optimizer, batches[5:], rank, world, True)
    end = repr(optimizer).count("SINGD without rows")
    return models.weights(getattr(model, "module", model)), between, end


@pytest.mark.parametrize("how", ["fully_shard", "copies", "copies that part the state"])
def test_two_processes_do_as_one(how: str) -> None:
    wanted, *counts = run(0, 1, "alone")
    assert counts == [3, 0]
    found = gloo.run(2, run, how)
    assert [own[1:] for own in found] == [(3, 0), (3, 0)]
    check([weights for weights, *_ in found], wanted)
