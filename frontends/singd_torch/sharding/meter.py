"""Rows measured where the factors are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from singd_core._array import Array, widen
from singd_core._tree import Tree, tree
from singd_core.curvature import Measured, measure
from singd_core.structures import Structure
from singd_torch.layers.layer import Layer


@tree
class Meter(Tree):
    """Measures rows with K = C = I, in at least float32: the owner of K and C makes of it the rest.

    Attributes:
        K: A matrix of the structure in which the rows of K are summed up.
        C: The same for C.
    """

    K: Structure
    C: Structure

    @classmethod
    def of(cls, layer: Layer) -> Meter:
        """The one of a layer."""
        device = layer.weight.device
        K, C = (
            structure.sums().identity(1, like=widen(torch.empty(0, dtype=dtype, device=device)))
            for structure, dtype in zip(layer.structures, layer.dtypes, strict=False)
        )
        return cls(K, C)

    def measuring(self) -> Meter:
        """What `measure` needs."""
        return self

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """The sums of rows A, shape (..., n, d_in), and B, shape (..., n, d_out)."""
        return measure(self.K, A, identity=True), measure(self.C, B, identity=True)


def by_samples(t: Tensor, axis: int) -> Any:
    """The rows of some samples along an axis, others on each process.

    Tensor parallelism has them in parts of their features, or all of them on each process.
    """
    if not isinstance(t, DTensor):
        return t
    return t.redistribute(placements=[Shard(axis)] * t.device_mesh.ndim).to_local()


def of_call(t: Tensor, mesh: DeviceMesh, axis: int, samples: int) -> DTensor:
    """What a call has, from the samples along an axis that `by_samples` has left here."""
    shape = torch.Size((*t.shape[:axis], samples, *t.shape[axis + 1 :]))
    stride = torch.empty(shape, device="meta").stride()
    places = [Shard(axis)] * mesh.ndim
    return DTensor.from_local(t, mesh, places, run_check=False, shape=shape, stride=stride)
