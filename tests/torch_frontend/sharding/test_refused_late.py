"""Models, wrappers and processes that are others after the optimizer was built, or on each process.

All of them are refused before anything is changed.
"""

import functools
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from test_guards import backward, network
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD


def refused(model: nn.Module, optimizer: SINGD) -> str:
    """What a step says, which changes nothing."""
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((RuntimeError, ValueError)) as error:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    return str(error.value)


def split_late(rank: int, world: int, how: str) -> str:
    """What is said of a model of which some blocks are split after it was given."""
    mesh = init_device_mesh("cpu", (world,))
    model: Any = network()
    if how != "whole before":
        fully_shard(model[3], mesh=mesh)
    optimizer = SINGD(model)
    if how == "tensor parallelism":
        parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    elif how == "other parts":
        model[3] = fully_shard(nn.Linear(6, 3).double(), mesh=mesh)
    else:
        fully_shard(model[0], mesh=mesh)
    return refused(model, optimizer)


@pytest.mark.parametrize(
    "how", ["whole before", "in parts before", "tensor parallelism", "other parts"]
)
def test_models_that_are_split_after_they_were_given_are_refused(how: str) -> None:
    layer = 3 if how == "other parts" else 0
    for text in gloo.run(2, split_late, how):
        assert f"'{layer}.weight' and '{layer}.bias'" in text
        assert "does not train the parts" in text
        assert "build the optimizer after parallelize_module" in text


def added_late(rank: int, world: int) -> None:
    """A block is added that is in no group."""
    mesh = init_device_mesh("cpu", (world,))
    model: Any = fully_shard(network(), mesh=mesh)
    optimizer = SINGD(model)
    model.append(fully_shard(nn.Linear(3, 3).double(), mesh=mesh))
    backward(model, 0)
    with pytest.warns(UserWarning, match=r"'4\.weight' has a gradient and is in no"):
        optimizer.step()


def test_parts_of_no_group_are_warned_about() -> None:
    gloo.run(2, added_late)


def trained(model: nn.Module, optimizer: SINGD) -> None:
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()


def flat_by_other_ways(rank: int, world: int, original: bool) -> None:
    """What is inside, parameters alone, and a wrapper that came after the optimizer."""

    def wrapped(model: nn.Module) -> Any:
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=device, use_orig_params=original)

    model = wrapped(network())
    with pytest.raises(TypeError, match="fully_shard"):
        SINGD(model.module)
    with pytest.raises(TypeError, match="fully_shard"):
        SINGD(model.parameters())
    for before in (0, 1):
        optimizer = SINGD(inner := network(), T=1, growing_T=False)
        for _ in range(before):
            trained(inner, optimizer)
        model = wrapped(inner)
        with pytest.raises(TypeError, match="fully_shard"):
            trained(model, optimizer)


@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_are_refused_however_they_are_given(original: bool) -> None:
    gloo.run(2, flat_by_other_ways, original)


def localized_late(rank: int, world: int) -> None:
    """Tensor parallelism that is wrapped after the optimizer was built."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "parts"))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(network(), mesh["parts"], plan)
    optimizer = SINGD(model, processes=mesh)
    backward(DistributedDataParallel(model, device_mesh=mesh["data"]), 0)
    with pytest.raises(TypeError, match="replicate_with_fsdp"):
        optimizer.step()


@pytest.mark.slow
def test_plain_parts_are_refused_in_the_first_step() -> None:
    gloo.run(4, localized_late)


class Named(SINGD):
    """A subclass is refused as well."""


def some_alone(rank: int, world: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns of torch.jit

    model = DistributedDataParallel(network())
    for kind in (SINGD, Named, functools.partial(SINGD, T=1)):
        with pytest.raises(TypeError, match=r"shard=True"):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind)
    assert ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
    assert SINGD(model, shard=True)


def test_optimizers_that_give_each_process_some_parameters_alone_are_refused() -> None:
    gloo.run(2, some_alone)


def without_one(rank: int, world: int) -> str:
    """What is said where one process has frozen a weight before the optimizer was built."""
    model = network()
    if rank == 1:
        model[0].weight.requires_grad_(False)
    return refused(model, SINGD(model, processes=dist.group.WORLD))


def test_copies_with_other_parameters_are_refused() -> None:
    for text in gloo.run(2, without_one):
        assert "in one place: '0.weight' (6, 4), '0.bias' (6,). Give all" in text
        assert "frozen on one alone" in text


def connect(rank: int, world: int, folder: str, name: str) -> None:
    how: dict[str, Any] = {"init_method": f"file://{folder}/{name}", "rank": rank}
    dist.init_process_group("gloo", world_size=world, **how)


def connected_anew(rank: int, world: int, folder: str, shard: bool) -> None:
    """The group of processes is destroyed, and there is another."""
    connect(rank, world, folder, "first")
    model = network()
    optimizer = SINGD(model, processes=dist.group.WORLD, shard=shard)
    backward(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    dist.destroy_process_group()
    gone = r"call state_dict\(\) before destroy_process_group"
    with pytest.raises(RuntimeError, match=gone):
        optimizer.step()
    connect(rank, world, folder, "second")
    with pytest.raises(RuntimeError, match=gone):
        optimizer.step()
    if shard:
        with pytest.raises(RuntimeError, match=gone):
            optimizer.state_dict()
    optimizer = SINGD(model, processes=dist.group.WORLD, shard=shard)
    if not shard:
        optimizer.load_state_dict(saved)
    optimizer.step()
    dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True])
def test_processes_that_are_gone_are_an_error(shard: bool, tmp_path: Path) -> None:
    gloo.run(2, connected_anew, str(tmp_path), shard, connect=False)


def given_memory_late(rank: int, world: int) -> str:
    """What is said of parts that were on the meta device when the optimizer was built."""
    with torch.device("meta"):
        model: Any = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    return refused(model, optimizer)


def test_parts_that_get_memory_late_are_refused() -> None:
    for text in gloo.run(2, given_memory_late):
        assert "'0.weight', '0.bias' and 4 more had no memory" in text
        assert "then call SINGD(model)" in text


class Stacked(nn.Module):
    """Experts of which each process has some."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        whole = torch.randn(2, 4, 4)
        self.experts = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))


def reason(rank: int, world: int) -> str:
    return repr(SINGD(Stacked(init_device_mesh("cpu", (world,)))))


def test_stacks_in_parts_say_why_they_have_no_rows() -> None:
    for text in gloo.run(2, reason):
        assert "processes have parts of this stack of matrices" in text
