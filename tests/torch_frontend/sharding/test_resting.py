"""The state of layers that are more than the share of a process rests in parts on all of them."""

import copy
import math
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch
import torch.distributed as dist
from test_fully_shard import STRUCTURES, check, shard, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD, estimate
from singd_torch.tensors import pieces

CASES: dict[str, dict[str, Any]] = STRUCTURES | {
    "each step": {"T": 1, "growing_T": False},
    "paper": {"recipe": "paper", "T": 2, "alpha1": 0.5},
    "no momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.1},
    "kfac": {"kfac": True},
}


def build(rank: int, world: int, name: str, how: str, given: Any) -> tuple[Any, SINGD]:
    model: Any = models.new(name)
    if how == "parts":
        shard(model, init_device_mesh("cpu", (world,)))
    elif how == "copies":
        model = DistributedDataParallel(model)
    return model, SINGD(model, shard=how == "copies", **models.settings(name, **given))


def bytes_here(optimizer: SINGD) -> int:
    """The bytes of the tensors of state on this process, numbers of each matrix apart."""
    sharded: Any = optimizer._stepper.sharded
    state = [t for own in sharded.share.state.values() for t in own.values() if t.ndim]
    state += sharded._resting._here.values()
    visits = [stack for stack in sharded.share.stacks if stack.visits]
    assert len(visits) == len(sharded.share.visitors)
    assert all(s.factors is s.momenta is s.late is s.preconditioner is None for s in visits)
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in state}.values())


def trained(rank: int, world: int, name: str, how: str, given: Any) -> Any:
    """The weights after four steps, and the bytes of state between them; with a checkpoint."""
    model, optimizer = build(rank, world, name, how, given)
    batches = models.data(name)
    models.train(model, optimizer, batches[:3], rank, world)
    here = bytes_here(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert bytes_here(optimizer) == here
    names = [sorted(own) for own in optimizer.state.values()]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, sorted(names))  # torch takes flat checkpoints apart by them
    assert all(own for p, own in zip(optimizer.state, names, strict=True) if p.ndim > 1)
    assert found == [sorted(names)] * world
    optimizer.load_state_dict(saved)
    models.train(model, optimizer, batches[3:], rank, world)
    return models.weights(getattr(model, "module", model)), here


def check_parts(world: int, name: str, how: str, given: dict[str, Any]) -> None:
    found = gloo.run(world, trained, name, how, given)
    check([weights for weights, _ in found], whole(name, given))
    total = sum(here for _, here in found)
    for _, here in found:
        assert here <= 1.2 * total / world


def test_two_processes_train_like_one() -> None:
    check_parts(2, "convolutions", "parts", {})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one_with_other_settings(case: str) -> None:
    check_parts(2, "convolutions", "parts", CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parts", "copies"])
@pytest.mark.parametrize("name", ["images", "convolutions"])
def test_four_processes_train_like_one(name: str, how: str) -> None:
    check_parts(4, name, how, {})


def single(rank: int, world: int) -> dict[str, Tensor]:
    """Of a layer with one output, whose factors are single numbers."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, T=1, growing_T=False, rows=math.inf)
    if world > 1:
        assert optimizer._stepper.sharded.share.visitors or rank == 1  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 6, dtype=torch.float64, generator=draw).chunk(world)[rank]
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
    return models.weights(model)


@pytest.mark.slow
def test_single_numbers_rest_too() -> None:
    check(gloo.run(2, single), single(0, 1))


def on_accelerators(rank: int, world: int, how: str, given: dict[str, Any]) -> Any:
    with mock.patch.object(pieces, "on_host", return_value=False):
        return trained(rank, world, "convolutions", how, given)[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parts", "copies"])
def test_processes_with_accelerators(how: str) -> None:
    given = {"fallback_lr": 0.0, "T": 2, "growing_T": False}
    with mock.patch.object(pieces, "on_host", return_value=False):
        wanted = whole("convolutions", given)
    check(gloo.run(2, on_accelerators, how, given), wanted)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64, 300])
def test_no_process_has_more_than_its_share(processes: int) -> None:
    for sides in ([32] * 7, [512, *[16] * 20], list(range(8, 90, 7))):
        model = nn.Sequential(*(nn.Linear(d, d, bias=False) for d in sides))
        found = estimate(model, processes=processes)
        # the parts of the smallest tensors are not equal
        assert max(found.by_process) <= 1.2 * found.total / processes + 1
