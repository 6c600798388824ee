"""Weights without rows and the biases that names tell: several processes do as one."""

import contextlib
import copy
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch.distributed as dist
from test_fully_shard import check, shard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD
from singd_torch.tensors import pieces


def run(
    rank: int, world: int, name: str, how: str, given: dict[str, Any], on_host: bool = True
) -> tuple[dict[str, Tensor], str]:
    """The weights after training with a checkpoint in between, and the table."""
    model: Any = models.new(name)
    if how == "fully_shard" and world > 1:
        model = shard(model, init_device_mesh("cpu", (world,)))
    elif world > 1:
        model = DistributedDataParallel(model)
    given = {"T": 2, "growing_T": False, "fallback_lr": 0.0} | given
    if how == "copies" and world > 1:
        given |= {"shard": True, "processes": dist.group.WORLD}

    def build() -> SINGD:
        parameters: Any = list(model.named_parameters())
        if "bias_lr" in given:
            biases = [own for own in parameters if own[0].endswith("bias")]
            others = [own for own in parameters if not own[0].endswith("bias")]
            parameters = [{"params": others}, {"params": biases, "lr": given["bias_lr"]}]
        return SINGD(parameters, **{k: v for k, v in given.items() if k != "bias_lr"})

    with contextlib.nullcontext() if on_host else mock.patch.object(pieces, "on_host", _no_host):
        optimizer = build()
        assert repr(optimizer).count(".weight + bias") > 1
        for i, batch in enumerate(models.data(name, 7)):
            if i == 4:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = build()
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            models.loss(model, *models.part_of(batch, rank, world)).backward()
            optimizer.step()
    return models.weights(getattr(model, "module", model)), repr(optimizer)


def _no_host(x: Tensor) -> bool:
    return False


def check_as_one(world: int, *case: Any, by_all: bool) -> None:
    """So many processes do as one; all of them step each weight whose bias is known, or one."""
    found = gloo.run(world, run, *case)
    check([weights for weights, _ in found], run(0, 1, *case)[0])
    lines = [line for _, text in found for line in text.splitlines() if ".weight + bias" in line]
    assert lines
    assert all(("  all  " in line) is by_all for line in lines)


@pytest.mark.parametrize("structures", [None, "diagonal"])
@pytest.mark.parametrize("how", ["fully_shard", "copies"])
def test_two_processes_do_as_one(how: str, structures: str | None) -> None:
    by_all = how == "fully_shard" and structures == "diagonal"
    check_as_one(2, "convolutions", how, {"structures": structures}, by_all=by_all)


@pytest.mark.slow
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {"structures": ("blockdiagonal:5", "diagonal")},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
        {"nesterov": False},
        {"momentum": 0.0},
        {"bias_lr": 0.03},
        {"bias_lr": 0.0},
    ],
    ids=str,
)
def test_two_processes_with_rows_of_weights_and_biases(
    given: dict[str, Any], on_host: bool
) -> None:
    given = {"structures": "diagonal"} | given
    check_as_one(2, "convolutions", "fully_shard", given, on_host, by_all=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])  # of four, some have nothing of some weights
@pytest.mark.parametrize("name", ["characters", "images"])
def test_processes_with_other_models(name: str, world: int) -> None:
    check_as_one(world, name, "fully_shard", {"structures": "diagonal"}, by_all=True)
