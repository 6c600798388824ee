"""Which part of each parameter is on which process."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a tensor: every placement of a DTensor has one on each process, maybe empty."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """That part of the whole tensor, a view."""
        pairs = zip(self.offset, self.shape, strict=True)
        return whole[tuple(slice(start, start + n) for start, n in pairs)]


def box_of(p: Tensor) -> Box:
    """The part of a parameter that is here; all of it for a plain tensor."""
    if not isinstance(p, DTensor):
        return Box((0,) * p.ndim, tuple(p.shape))
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return Box(tuple(offset), tuple(shape))


def boxes(params: Sequence[Tensor], group: dist.ProcessGroup) -> dict[Tensor, list[Box]]:
    """The boxes of each parameter on all processes of the group, which all call this."""
    found: list[list[Box]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, [box_of(p) for p in params], group=group)
    return {p: list(each) for p, each in zip(params, zip(*found, strict=True), strict=True)}


def rows(shape: Sequence[int], processes: int) -> list[Box]:
    """The parts of a tensor whose first axis is parted as by `Shard(0)`, or that all have whole."""
    if not shape or shape[0] == 0:
        return [Box((0,) * len(shape), tuple(shape))] * processes
    n, *others = shape
    most = -(-n // processes)
    starts = [min(n, most * r) for r in range(processes + 1)]
    zeros = (0,) * len(others)
    return [
        Box((start, *zeros), (end - start, *others)) for start, end in itertools.pairwise(starts)
    ]


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


def group_of_parts(params: Iterable[Tensor]) -> dist.ProcessGroup:
    """The group of all processes that have parts of the parameters.

    Raises:
        ValueError: If the parameters are spread over meshes of which none has all processes.
    """
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    largest: DeviceMesh = max(meshes, key=lambda mesh: mesh.size())
    every = set(largest.mesh.flatten().tolist())
    if not all(some <= every for some in ranks):
        raise ValueError(
            "the parameters are on several meshes, of which none has the processes of all: give "
            "SINGD(model, processes=mesh) one that has"
        )
    if every == set(range(dist.get_world_size())):
        world = dist.group.WORLD
        assert world is not None
        return world
    if largest.ndim == 1:
        return largest.get_group()
    found = dist.new_group(sorted(every), use_local_synchronization=True)
    assert isinstance(found, dist.ProcessGroup)
    return found
