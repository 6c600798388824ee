"""Parts of parameters on their way to the owners of layers, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_torch.sharding.boxes import Box, boxes


class Exchange:
    """Moves parts of parameters in one all-to-all for all of them. All processes call it alike."""

    def __init__(self, owners: Mapping[nn.Parameter, int], group: dist.ProcessGroup) -> None:
        """`owners` are who wants to have parameters whole, by their rank in the group."""
        self._group, self._owners = group, owners
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._boxes = dict(zip(owners, boxes(list(owners), group), strict=True))
        self._givers = {p: _givers(self._boxes[p], owner) for p, owner in owners.items()}

    def to_owners(self, given: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor | None]:
        """What belongs to parameters, such as gradients, whole at their owners, and None elsewhere.

        Args:
            given: The parameters, and the parts of it that are here.
        """
        mine, ranks = self._rank, range(self._world)
        out = [
            [t for p, t in given if self._owners[p] == r and mine in self._givers[p]] for r in ranks
        ]
        params = [p for p, _ in given if self._owners[p] == mine]
        sizes = [
            sum(self._givers[p][r].numel for p in params if r in self._givers[p]) for r in ranks
        ]
        got = [_Reader(part) for part in self._all_to_all(given, out, sizes)]
        wholes: list[Tensor | None] = []
        for p, t in given:
            whole = None
            if self._owners[p] == mine:
                whole = torch.empty(p.shape, dtype=t.dtype, device=t.device)
                for r, box in self._givers[p].items():
                    box.of(whole).copy_(got[r].take(box))
            wholes.append(whole)
        return wholes

    def to_all(self, given: Sequence[tuple[nn.Parameter, Tensor | None]]) -> list[Tensor]:
        """The parts that are to be here of what the owners have whole, given None elsewhere."""
        mine, ranks = self._rank, range(self._world)
        out = [[self._boxes[p][r].of(t) for p, t in given if t is not None] for r in ranks]
        sizes = [
            sum(self._boxes[p][mine].numel for p, _ in given if self._owners[p] == r) for r in ranks
        ]
        got = [_Reader(part) for part in self._all_to_all(given, out, sizes)]
        return [got[self._owners[p]].take(self._boxes[p][mine]) for p, _ in given]

    def _all_to_all(
        self,
        given: Sequence[tuple[nn.Parameter, Tensor | None]],
        out: Sequence[Sequence[Tensor]],
        sizes: Sequence[int],
    ) -> Sequence[Tensor]:
        """What each process has for this one, of so many numbers."""
        dtype = reduce(torch.promote_types, (p.dtype for p, _ in given))
        device = given[0][0].device
        sent = [t.reshape(-1).to(dtype) for tensors in out for t in tensors]
        joined = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=device)
        got = torch.empty(sum(sizes), dtype=dtype, device=device)
        counts = [sum(t.numel() for t in tensors) for tensors in out]
        dist.all_to_all_single(got, joined, list(sizes), counts, group=self._group)
        return torch.split(got, list(sizes))


class _Reader:
    """Takes one part after the other."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._at = flat, 0

    def take(self, box: Box) -> Tensor:
        start, self._at = self._at, self._at + box.numel
        return self._flat[start : self._at].reshape(box.shape)


def _givers(parts: Sequence[Box], owner: int) -> dict[int, Box]:
    """Who gives each distinct part to the owner: of copies the nearest one, itself if it can."""
    found: dict[Box, int] = {}
    for rank in sorted(range(len(parts)), key=lambda rank: abs(rank - owner)):
        if parts[rank].numel:
            found.setdefault(parts[rank], rank)
    return {rank: box for box, rank in sorted(found.items(), key=lambda pair: pair[1])}
