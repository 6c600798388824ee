"""Parts of parameters on their way to the owners of layers, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd_torch.sharding.box import Box

# Numbers that go in one all-to-all: it needs as many on each process beside the tensors.
_TOGETHER = 1 << 22


class Exchange:
    """Moves parts of tensors in one all-to-all for all that are given, or in none if all are there.

    All processes call it alike.
    """

    def __init__(
        self,
        owners: Mapping[Any, int],
        boxes: Mapping[Any, Sequence[Box]],
        group: dist.ProcessGroup,
    ) -> None:
        """For tensors by any key: who wants to have each whole, and the parts of all processes.

        Processes are counted as in the group.
        """
        self._group, self._owners, self._boxes = group, owners, boxes
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._givers = {key: _givers(boxes[key], owner) for key, owner in owners.items()}
        self._there = {key for key, givers in self._givers.items() if [*givers] == [owners[key]]}

    def buckets(self, keys: Iterable[Any]) -> list[list[Any]]:
        """The keys in their order, in lists whose tensors go together."""
        found: list[list[Any]] = []
        total = 0
        for key in keys:
            n = math.prod(_whole(self._boxes[key]))
            if not found or total + n > _TOGETHER:
                found.append([])
                total = 0
            found[-1].append(key)
            total += n
        return found

    def to_owners(self, given: Sequence[tuple[Any, Tensor]]) -> list[Tensor | None]:
        """The whole tensors at their owners, None elsewhere, from keys and the parts here.

        A part that is the whole tensor of its owner is returned itself.
        """
        mine, ranks = self._rank, range(self._world)
        out = [
            [t for key, t in given if self._owners[key] == r != mine and mine in self._givers[key]]
            for r in ranks
        ]
        keys = [key for key, _ in given if self._owners[key] == mine]
        sizes = [
            sum(self._givers[key][r].numel for key in keys if r != mine and r in self._givers[key])
            for r in ranks
        ]
        like = given[0][1]
        dtype = reduce(torch.promote_types, (t.dtype for _, t in given))
        got: list[_Reader] = []
        if any(key not in self._there for key, _ in given):
            got = self._all_to_all(out, sizes, like.new_empty(0, dtype=dtype))
        wholes: list[Tensor | None] = []
        for key, t in given:
            whole = None
            if self._owners[key] == mine and key in self._there:
                whole = t
            elif self._owners[key] == mine:
                whole = t.new_empty(_whole(self._boxes[key]))
                for r, box in self._givers[key].items():
                    box.of(whole).copy_(t if r == mine else got[r].take(box))
            wholes.append(whole)
        return wholes

    def to_all(self, given: Sequence[tuple[Any, Tensor | None]], like: Tensor) -> list[Tensor]:
        """The parts that are to be here, from keys and whole tensors, None where not owned.

        They come in the dtype of `like`, which holds the dtypes of all, on its device. The parts of
        an owner are views.
        """
        mine, ranks = self._rank, range(self._world)
        own = [(key, t) for key, t in given if t is not None]
        out = [[self._boxes[key][r].of(t) for key, t in own if r != mine] for r in ranks]
        sizes = [
            sum(self._boxes[key][mine].numel for key, _ in given if self._owners[key] == r != mine)
            for r in ranks
        ]
        got = self._all_to_all(out, sizes, like)
        return [
            got[self._owners[key]].take(self._boxes[key][mine])
            if t is None
            else self._boxes[key][mine].of(t).to(like)
            for key, t in given
        ]

    def _all_to_all(
        self, out: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor
    ) -> list[_Reader]:
        """What each process has for this one, of so many numbers."""
        sent = [t.reshape(-1).to(like) for tensors in out for t in tensors]
        joined = torch.cat(sent) if sent else like.new_empty(0)
        got = like.new_empty(sum(sizes))
        counts = [sum(t.numel() for t in tensors) for tensors in out]
        dist.all_to_all_single(got, joined, list(sizes), counts, group=self._group)
        return [_Reader(part) for part in torch.split(got, list(sizes))]


class _Reader:
    """Takes one part after the other."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._at = flat, 0

    def take(self, box: Box) -> Tensor:
        start, self._at = self._at, self._at + box.numel
        return self._flat[start : self._at].reshape(box.shape)


def _whole(parts: Sequence[Box]) -> tuple[int, ...]:
    """The shape of a tensor that has these parts."""
    ends = [[o + n for o, n in zip(box.offset, box.shape, strict=True)] for box in parts]
    return tuple(map(max, zip(*ends, strict=True)))


def _givers(parts: Sequence[Box], owner: int) -> dict[int, Box]:
    """Who gives each distinct part to the owner: of copies the nearest one, itself if it can."""
    found: dict[Box, int] = {}
    for rank in sorted(range(len(parts)), key=lambda rank: abs(rank - owner)):
        if parts[rank].numel:
            found.setdefault(parts[rank], rank)
    return {rank: box for box, rank in sorted(found.items(), key=lambda pair: pair[1])}
