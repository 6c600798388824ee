"""Every way in which weights may be in parts trains like one process with the whole batch."""

from typing import Any

import gloo
import models
import pytest
import torch.distributed as dist
from test_fully_shard import STRUCTURES, check, shard, whole
from torch import Tensor, nn
from torch.distributed._composable import replicate as copied
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from singd_torch import SINGD


def tensor_parallel(model: Any, mesh: DeviceMesh, *, sequence: bool) -> None:
    """The plan of a transformer; with `sequence`, norms have parts of the sequence each."""
    column, row = ColwiseParallel(), RowwiseParallel()
    layouts: dict[str, Any] = {"output_layouts": Shard(1)} if sequence else {}
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for block in model.blocks:
        plan = {f"attention.{name}": column for name in "qkv"} | {
            "attention.out": RowwiseParallel(**layouts),
            "mlp.up": column,
            "mlp.down": RowwiseParallel(**layouts) if sequence else row,
        }
        if sequence:
            plan |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
            plan |= {"attention": gathered, "mlp": gathered}
        parallelize_module(block, mesh, plan)
    inputs = Shard(1) if sequence else Replicate()
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=inputs),
        "head": ColwiseParallel(input_layouts=inputs, output_layouts=Replicate()),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)


def parted(name: str, how: str, world: int) -> tuple[nn.Module, int, int]:
    """A model on a mesh, and which of how many parts of a batch this process has."""
    model = models.new(name)
    if how == "parts":
        shard(model, init_device_mesh("cpu", (world,)))
    elif how == "replicate":
        replicate(model, mesh=init_device_mesh("cpu", (world,)))
    elif how == "copies":
        copied(model)
    elif how == "columns":
        shard(
            model,
            init_device_mesh("cpu", (world,)),
            shard_placement_fn=lambda p: (
                Shard(1) if p.ndim == 2 and p.shape[1] % world == 0 else None
            ),
        )
    elif how == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "parts"))
        shard(model, mesh)
    elif how in ("tensor", "sequence"):
        tensor_parallel(model, init_device_mesh("cpu", (world,)), sequence=how == "sequence")
        return model, 0, 1
    else:  # both
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        tensor_parallel(model, mesh["tensor"], sequence=how == "data and sequence")
        shard(model, mesh["data"])
        return model, mesh["data"].get_local_rank(), 2
    return model, dist.get_rank(), world


def trained(rank: int, world: int, name: str, how: str, case: str) -> dict[str, Tensor]:
    model, index, of = parted(name, how, world)
    optimizer = SINGD(model, **models.settings(name, **STRUCTURES[case]))
    models.train(model, optimizer, models.data(name), index, of)
    return models.weights(model)


@pytest.mark.parametrize(
    "how",
    ["replicate", "columns", "tensor", "sequence", pytest.param("copies", marks=pytest.mark.slow)],
)
def test_two_processes(how: str) -> None:
    found = gloo.run(2, trained, "characters", how, "default")
    check(found, whole("characters", STRUCTURES["default"]))


def forgetful(rank: int, world: int, how: str) -> dict[str, Tensor]:
    model, index, of = parted("characters", how, world)
    optimizer = SINGD(model, **models.settings("characters"))
    with models.exact_counts():
        for batch in models.data("characters"):
            for used in (models.data("characters")[0], batch):
                model.zero_grad()  # and not the optimizer
                models.loss(model, *models.part_of(used, index, of)).backward()
            optimizer.step()
    return models.weights(model)


@pytest.mark.parametrize("how", ["replicate", pytest.param("tensor", marks=pytest.mark.slow)])
def test_rows_of_passes_whose_gradients_the_model_forgets_are_dropped(how: str) -> None:
    check(gloo.run(2, forgetful, how), whole("characters", {}))


@pytest.mark.slow
@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.parametrize(
    "how", ["replicate", "hybrid", "data and tensor", "data and sequence", "tensor"]
)
def test_four_processes(how: str, case: str) -> None:
    found = gloo.run(4, trained, "characters", how, case)
    check(found, whole("characters", STRUCTURES[case]))
