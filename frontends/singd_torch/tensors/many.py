"""Structured matrices of several shapes as one, whose equal blocks are multiplied together.

A rule of the core runs on them as it runs on one matrix. Its numbers are vectors then, with a
number for each matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core.structures import Diagonal, Structure
from singd_torch.tensors.layout import Layout
from singd_torch.tensors.select import spread


class Many:
    """The matrices of a layout, with the operations of a structure that rules ask for.

    Attributes:
        layout: The layout.
        pools: The structures of the pools.
        known: Whether the matrices of each group are there.
    """

    def __init__(
        self, layout: Layout, pools: Sequence[Any], known: Sequence[bool] | None = None
    ) -> None:
        self.layout, self.pools = layout, pools
        self.known = known or [True] * len(layout.groups)

    @classmethod
    def joined(cls, layout: Layout, parts: Sequence[Structure], *, owned: bool = False) -> Many:
        """The matrices of all groups, perhaps in the memory of parts unless they are `owned`."""
        found: list[list[Any]] = [[] for _ in layout.pools]
        for group, part, places in zip(layout.groups, parts, layout.places, strict=True):
            if group.is_apart:
                found[places[0].pool] = [part.map(torch.clone) if owned else part]
                continue
            for (_, a), place in zip(part.named_arrays(), places, strict=True):
                if place.pool >= 0:
                    pool = layout.pools[place.pool]
                    block = (pool.rows,) * (1 if pool.structure is Diagonal else 2)
                    found[place.pool].append(a.reshape(-1, *block))
        joined = [
            own[0]
            if pool.batch is not None
            else pool.structure(torch.cat(own) if owned or len(own) > 1 else own[0])  # type: ignore[call-arg]
            for pool, own in zip(layout.pools, found, strict=True)
        ]
        return cls(layout, joined)

    def part(self, i: int) -> Structure:
        """The matrices of a group, views."""
        return self.layout.part(i, self.pools)

    def parts(self) -> list[Structure]:
        """The matrices of each group."""
        return [self.part(i) for i in range(len(self.layout.groups))]

    def write(self, new: Many, keep: Tensor) -> None:
        """Take what is new of the matrices that are to be kept."""
        for k, (own, other) in enumerate(zip(self.pools, new.pools, strict=True)):
            use = self.layout.spread(k, keep)
            own.map(lambda a, b, use=use: torch.where(spread(use, a), b, a, out=a), other)

    def _each(self, function: Callable[..., Any], *others: Many, c: Any = None) -> Many:
        given = enumerate(zip(self.pools, *(other.pools for other in others), strict=True))
        if c is None:
            return Many(self.layout, [function(*own) for _, own in given])
        return Many(self.layout, [function(self.layout.spread(k, c), *own) for k, own in given])

    # ---- as structures have them ----------------------------------------------------------------

    @property
    def like(self) -> Tensor:
        """One of the arrays."""
        return self.pools[0].like  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are, and the largest side."""
        d = max(group.side for group in self.layout.groups)
        return self.layout.numbers[-1].stop, d, d

    def map(self, function: Callable[..., Any], *others: Many) -> Many:
        """The matrices of `function(array, *arrays of the others)`."""
        return self._each(lambda *own: own[0].map(function, *own[1:]), *others)

    def astype(self, like: Tensor) -> Many:
        """The same in the dtype of `like`."""
        return self if self.like.dtype == like.dtype else self._each(lambda L: L.astype(like))

    def scale(self, c: Any) -> Many:
        """`c L`."""
        return self._each(lambda c, L: L.scale(c), c=c)

    def add_scaled(self, c: Any, other: Many) -> Many:
        """`L + c L'`."""
        return self._each(lambda c, L, M: L.add_scaled(c, M), other, c=c)

    def shifted(self, c: float) -> Many:
        """`L + c I`, in place of L."""
        return self._each(lambda L: L.shifted(c))

    def gram(self) -> Many:
        """Π̂(Lᵀ L)."""
        return self._each(lambda L: L.gram())

    def matmul(self, other: Many) -> Many:
        """`L L'`."""
        return self._each(lambda L, M: L.matmul(M), other)

    def square_for(self, T: int, columns: int) -> Many | None:
        """`L Lᵀ` of those that T products with their own columns are worth it, None if of none."""
        wanted = [T * own.columns > own.structure.width(own.side) for own in self.layout.groups]
        squares = [L.square() for L in self.pools] if any(wanted) else [None]
        if any(P is None for P in squares):
            return None
        return Many(self.layout, squares, wanted)

    def scale_rows(self, c: Tensor) -> Many | None:
        """`diag(c) L`, with c of all rows; None where one of them has no structure then."""
        each = self.layout.in_pools(c)
        scaled = [L.scale_rows(own) for L, own in zip(self.pools, each, strict=True)]
        return None if any(L is None for L in scaled) else Many(self.layout, scaled, self.known)

    def row_norms(self) -> Tensor:
        """The norms of the rows of all."""
        return self.layout.in_rows([L.row_norms() for L in self.pools])

    def norm(self) -> Tensor:
        """The Frobenius norm of each."""
        return self.layout.norms(self.pools)

    def row_size(self) -> Tensor:
        """The root mean square of the norms of the rows of each."""
        norms = self.norm()
        return norms * self.layout.powers(-0.5, norms)
