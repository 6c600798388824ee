"""Which part of each parameter is on which process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from singd_core.rounding import Place
from singd_torch._distributed import new_group, of_same
from singd_torch.sharding.box import Box


def box_of(p: Tensor) -> Box:
    """The part of a parameter that is here; all of it for a plain tensor."""
    if not isinstance(p, DTensor):
        return Box((0,) * p.ndim, tuple(p.shape))
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return Box(tuple(offset), tuple(shape))


def place_of(p: Tensor) -> Place:
    """Where the part of a parameter that is here stands in it."""
    box, whole = box_of(p), tuple(p.shape)
    place = Place.of(whole, box.offset)
    return Place(place.start) if box.shape[1:] == whole[1:] else place


def boxes(
    params: Sequence[nn.Parameter], names: Mapping[Any, str], group: dist.ProcessGroup
) -> dict[nn.Parameter, list[Box]]:
    """The boxes of each parameter on all processes of the group, which all call this.

    Raises:
        ValueError: If a process has other parameters, or has them in another order.
    """
    every = of_same(params, names, group, map(box_of, params))
    return {p: list(each) for p, each in zip(params, zip(*every, strict=True), strict=True)}


def local(t: Tensor) -> Tensor:
    """The part of a tensor that is here, in the memory that it has. Not to be differentiated."""
    return t.to_local() if isinstance(t, DTensor) else t


def local_gradient(p: nn.Parameter) -> Tensor:
    """The part of a gradient that belongs to the part of its parameter that is here.

    Tensor parallelism may leave a gradient whole, or in terms of a sum, where the weight is parted.
    """
    gradient = p.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(p, DTensor):
        if gradient.placements != p.placements:
            gradient = gradient.redistribute(placements=p.placements)
        return gradient.to_local()
    return gradient


def check_has_parts(group: dist.ProcessGroup, params: Iterable[Tensor]) -> None:
    """Check that all processes that have parts of the parameters are in a group.

    Raises:
        ValueError: If one is not.
    """
    ranks = set(dist.get_process_group_ranks(group))
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    if not all(ranks.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes):
        raise ValueError(
            "the parameters have parts on processes that are none of those that were given: give "
            "SINGD(model, processes=mesh) the whole mesh, with the axes along which the model is "
            "in parts and those along which its gradients are averaged"
        )


def group_of_parts(params: Iterable[Tensor]) -> dist.ProcessGroup:
    """The group of all processes that have parts of the parameters.

    Raises:
        ValueError: If the parameters are spread over meshes and no mesh has all processes.
    """
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    largest: DeviceMesh = max(meshes, key=lambda mesh: mesh.size())
    every = set(largest.mesh.flatten().tolist())
    if not all(some <= every for some in ranks):
        raise ValueError(
            "the parameters are on several meshes, and none of them has the processes of all: give "
            "SINGD(model, processes=mesh) one that has"
        )
    if every == set(range(dist.get_world_size())):
        world = dist.group.WORLD
        assert world is not None
        return world
    if largest.ndim == 1:
        return largest.get_group()
    return new_group(sorted(every))
