"""Parts of tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from torch import Tensor


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
