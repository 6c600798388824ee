"""Where matrices of several shapes stand together: equal blocks of them in one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singd_core.structures import Dense, Diagonal, Structure
from singd_core.structures.blockdiagonal import blockdiagonal
from singd_torch.tensors.matrices import norms_of


def _pooled(structure: type[Structure]) -> type[Structure] | None:
    """The structure of the array that has blocks of this and of other structures, or None.

    A subclass may do other things with its blocks.
    """
    made_by = vars(structure).get("made_by")
    if structure is Dense or (made_by is not None and made_by[0] is blockdiagonal):
        return Dense
    return Diagonal if structure is Diagonal else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal matrices, such as the factors of a stack of layers.

    Attributes:
        structure: Their structure.
        side: The side of each.
        batch: The axes of their numbers.
        columns: How many columns each is multiplied with in a step.
    """

    structure: type[Structure]
    side: int
    batch: tuple[int, ...]
    columns: int

    @property
    def count(self) -> int:
        """How many they are."""
        return prod(self.batch)

    @property
    def is_apart(self) -> bool:
        """Whether their arrays do not stand with the arrays of others."""
        return _pooled(self.structure) is None


@dataclasses.dataclass(eq=False)
class _Pool:
    """Blocks of one shape, of the matrices of several groups; or the matrices of one group.

    Attributes:
        structure: In what blocks stand along a first axis.
        batch: The axes of the matrices of one group, None of blocks.
        rows: The rows of each.
        numbers: The matrix of each.
        of: The same on the device, or a range.
    """

    structure: type[Structure]
    batch: tuple[int, ...] | None
    rows: int
    numbers: list[int] = dataclasses.field(default_factory=list)
    of: Any = None

    def add(self, numbers: range, each: int) -> slice:
        """Have so many more blocks of each of these matrices."""
        start = len(self.numbers)
        self.numbers += [n for n in numbers for _ in range(each)]
        return slice(start, len(self.numbers))


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """Which blocks of a pool an array of a group is, and its shape."""

    pool: int
    blocks: slice
    shape: tuple[int, ...]


class _Indices:
    """Makes indices on a device, in half the bytes of int64, where equal ones stand once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, dict[bytes, Tensor]()

    def __call__(self, numbers: Any) -> Tensor:
        """These."""
        found = np.asarray(numbers, dtype=np.int32)
        key = found.tobytes()
        if key not in self._known:
            self._known[key] = torch.from_numpy(found).to(self._device, non_blocking=True)
        return self._known[key]


class Layout:
    """Which arrays of groups of matrices stand together.

    Attributes:
        groups: The groups.
        numbers: Where the numbers of each are, in a vector for all matrices.
        rows: Where the rows of each are, in a vector for all rows.
        pools: The pools.
        matrix_of: The number of the matrix of each row.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.groups, self.pools, self._device = groups, list[_Pool](), device
        self._powers: dict[tuple[float, torch.dtype], Tensor] = {}
        self.numbers = slices(group.count for group in groups)
        self.rows = slices(group.count * group.side for group in groups)
        nothing = torch.empty(0, device="meta")
        self._ends = {
            numbers.stop: rows.stop for numbers, rows in zip(self.numbers, self.rows, strict=True)
        }
        self.templates = [
            group.structure.identity(group.side, like=nothing, batch=group.batch)
            for group in groups
        ]
        known: dict[Any, int] = {}
        self.places = [
            self._placed(group, template, range(own.start, own.stop), known)
            for group, template, own in zip(groups, self.templates, self.numbers, strict=True)
        ]
        indices = _Indices(device)
        for pool in self.pools:
            n = pool.numbers
            pool.of = slice(n[0], n[-1] + 1)
            if n != list(range(n[0], n[-1] + 1)):
                pool.of = indices(n)
        further = [
            n
            for own, places in zip(self.numbers, self._there(), strict=True)
            for _ in places[1:]
            for n in range(own.start, own.stop)
        ]
        self._further = indices(further)
        order = self._rows_in_pools()
        self._order = self._back = None
        if not np.array_equal(order, np.arange(len(order))):
            self._order, self._back = map(indices, (order, order.argsort()))
        sides = [group.side for group in groups for _ in range(group.count)]
        self.matrix_of = indices(np.repeat(np.arange(len(sides)), sides))

    def _placed(
        self, group: Group, template: Structure, numbers: range, known: dict[Any, int]
    ) -> list[_Place]:
        """Where the arrays of a group stand, in pools that are made where there is none."""
        to = _pooled(group.structure)
        if to is None:
            self.pools.append(_Pool(group.structure, group.batch, group.side))
            return [_Place(len(self.pools) - 1, self.pools[-1].add(numbers, 1), ())]
        found = []
        for _, a in template.named_arrays():
            side = 1 if to is Diagonal else a.shape[-1]
            if not a.numel():
                found.append(_Place(-1, slice(0), tuple(a.shape)))
                continue
            k = known.setdefault((to, side), len(self.pools))
            if k == len(self.pools):
                self.pools.append(_Pool(to, None, side))
            each = a.numel() // (group.count * (1 if to is Diagonal else side * side))
            found.append(_Place(k, self.pools[k].add(numbers, each), tuple(a.shape)))
        return found

    def _rows_in_pools(self) -> Any:
        """Where the rows of all matrices are among the rows of the pools."""
        starts = slices(len(pool.numbers) * pool.rows for pool in self.pools)
        every = [
            np.arange(start.start, start.stop).reshape(-1, pool.rows)
            for start, pool in zip(starts, self.pools, strict=True)
        ]
        each = (
            np.concatenate([every[p.pool][p.blocks].reshape(group.count, -1) for p in places], 1)
            for group, places in zip(self.groups, self._there(), strict=True)
        )
        return np.concatenate([rows.reshape(-1) for rows in each])

    def _there(self) -> list[list[_Place]]:
        return [[place for place in places if place.pool >= 0] for places in self.places]

    def part(self, i: int, pools: Sequence[Any]) -> Structure:
        """The matrices of a group, views."""
        places = self.places[i]
        if self.groups[i].is_apart:
            return pools[places[0].pool]  # type: ignore[no-any-return]
        nothing = pools[self._there()[i][0].pool].like[:0]
        return self.templates[i].rebuild(
            (pools[p.pool].like[p.blocks] if p.pool >= 0 else nothing).view(p.shape) for p in places
        )

    def powers(self, p: float, like: Tensor) -> Tensor:
        """d^p of each matrix of side d, in the dtype of `like`."""
        key = p, like.dtype
        if key not in self._powers:
            powers = [group.side**p for group in self.groups for _ in range(group.count)]
            made = torch.tensor(powers, dtype=like.dtype, device="cpu")
            self._powers[key] = made.to(self._device, non_blocking=True)
        return self._powers[key]

    def on_rows(self, c: Tensor) -> Tensor:
        """The numbers of all matrices, or of the first groups alone, for each of their rows.

        They are along the last axis.
        """
        return c.index_select(-1, self.matrix_of[: self._ends[c.shape[-1]]])

    def squares_of(self, rows: Tensor) -> Tensor:
        """The sums of the squares of what the rows have, of all groups or of the first alone."""
        each = zip(self.groups, self.rows, strict=True)
        some = (rows[own].view(group.count, -1) for group, own in each if own.stop <= len(rows))
        norms = norms_of([vector for own in some for vector in own.unbind()])
        return norms * norms

    def spread(self, k: int, c: Any) -> Any:
        """The numbers of the blocks of a pool, where matrices have numbers of their own."""
        if not isinstance(c, Tensor) or c.ndim == 0:
            return c
        pool = self.pools[k]
        own = c[pool.of] if isinstance(pool.of, slice) else c.index_select(0, pool.of)
        return own if pool.batch is None else own.view(pool.batch)

    def norms(self, pools: Sequence[Any]) -> Tensor:
        """The Frobenius norm of each matrix."""
        first: dict[int, Tensor] = {}
        more: list[Tensor] = []  # the further arrays of matrices that have several
        for i, (group, places) in enumerate(zip(self.groups, self._there(), strict=True)):
            numbers = range(self.numbers[i].start, self.numbers[i].stop)
            if group.is_apart:
                first |= zip(
                    numbers, pools[places[0].pool].norm().reshape(-1).unbind(), strict=True
                )
                continue
            one, *others = (
                pools[p.pool].like[p.blocks].view(group.count, -1).unbind() for p in places
            )
            first |= zip(numbers, one, strict=True)
            more += (a for other in others for a in other)
        norms = norms_of([first[n] for n in range(len(first))] + more)
        if not more:
            return norms
        squares, n = norms * norms, len(first)
        return squares[:n].index_add_(0, self._further, squares[n:]).sqrt_()

    def in_rows(self, each: Sequence[Tensor]) -> Tensor:
        """What the rows of the pools have, in a vector for the rows of all matrices."""
        flat = torch.cat([own.reshape(-1) for own in each])
        return flat if self._order is None else flat.index_select(0, self._order)

    def in_pools(self, rows: Tensor) -> list[Tensor]:
        """What the rows of all matrices have, by pool."""
        flat = rows if self._back is None else rows.index_select(0, self._back)
        each = torch.split(flat, [len(pool.numbers) * pool.rows for pool in self.pools])
        return [
            own.view(*((-1,) if pool.batch is None else pool.batch), pool.rows)
            for own, pool in zip(each, self.pools, strict=True)
        ]


def slices(sizes: Iterable[int]) -> list[slice]:
    """Ranges of these sizes, one behind the other."""
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
