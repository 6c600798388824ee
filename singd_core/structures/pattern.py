"""Structures whose numbers are entries of the matrix."""

from __future__ import annotations

from singd_core._array import Array, namespace, norm
from singd_core.structures.base import Structure


class Pattern(Structure):
    """A structure in which each stored number is one entry of the matrix (a zero pattern).

    Closed under multiplication exactly when the pattern is a preorder: `(i, i)` always, and with
    `(i, j)` and `(j, k)` also `(i, k)`. Norms need no dense matrix here.
    """

    def norm(self) -> Array:
        axes = len(self.batch)
        norms = [norm(a, a.ndim - axes) for _, a in self.named_arrays() if 0 not in a.shape]
        xp = namespace(self.like)
        if not norms:  # of a side of 0
            return norm(self.like, self.like.ndim - axes)
        return norms[0] if len(norms) == 1 else xp.linalg.vector_norm(xp.stack(norms), axis=0)

    def max_abs(self) -> Array:
        axes, xp = len(self.batch), namespace(self.like)
        largest: Array = None
        for _, a in self.named_arrays():
            if 0 not in a.shape:
                new = xp.max(xp.abs(a), axis=tuple(range(axes, a.ndim)))
                largest = new if largest is None else xp.maximum(largest, new)
        return self.norm() if largest is None else largest
