"""The product that makes a natural gradient of a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Self

from singd_core._array import Array, cast
from singd_core._scalars import at_least
from singd_core.curvature import TINY
from singd_core.structures.base import Structure


@dataclasses.dataclass(frozen=True)
class Side:
    """The product with one of P_K and P_C, balanced or not.

    Attributes:
        L: The matrix, or a factor L with P = L Lᵀ.
        whole: Whether it is the matrix.
        scale: What the rows of the product are multiplied by, or None.
    """

    L: Structure
    whole: bool
    scale: Array | None = None

    @classmethod
    def of(cls, L: Structure, P: Structure | None, scale: Array | None) -> Self:
        """The product with P = L Lᵀ, or with diag(scale) P."""
        if scale is None:
            return cls(P or L, P is not None)
        scaled = None if P is None else P.scale_rows(cast(scale, P.like))
        return cls(L, False, scale) if scaled is None else cls(scaled, True)

    def __call__(self, X: Array, out: Array | None = None) -> Array:
        """The product with X, shape (..., d, n); `out` may be written to, where arrays can be."""
        X = cast(X, self.L.like)
        if self.whole:
            found = None if out is None else self.L.apply_into(X, out)
            return self.L.apply(X) if found is None else found
        product = self.L.precondition(X)
        return product if self.scale is None else product * cast(self.scale, product)[..., None]


def balance(row_norms: Array) -> Array:
    """D^(−½) of P = L Lᵀ, whose diagonal D has the squares of the norms of the rows of L."""
    return at_least(row_norms, TINY) ** -1.0


def products(x: Iterable[Array], y: Iterable[Array]) -> list[Array]:
    """The products of pairs, in the dtypes of the first."""
    return [a * cast(b, a) for a, b in zip(x, y, strict=True)]


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """∇W ↦ P_C ∇W P_K, the natural gradient of ∇W, shape (..., d_out, d_in), in the dtype of C.

    If it is balanced, each entry is divided by √(D_C D_K) of its row and column. D_C and D_K are
    the diagonals of P_C and P_K. Gradients with the covariance of the curvature then give entries
    of equal variance. If the scales of `Levels` are measured, they multiply rows and columns too.

    Attributes:
        K: The product with P_K.
        C: The product with P_C.
    """

    K: Side
    C: Side

    @classmethod
    def of(
        cls,
        known: Sequence[Structure | None],
        factors: Sequence[Structure],
        scales: Sequence[Array | None],
    ) -> Self:
        """With P_K and P_C where they are known, and else with the factors."""
        K, C = (Side.of(L, P, c) for L, P, c in zip(factors, known, scales, strict=True))
        return cls(K, C)

    def __call__(self, gradient: Array) -> Array:
        """The natural gradient."""
        return self.left(self.right(gradient))

    def right(self, gradient: Array, out: Array | None = None) -> Array:
        """∇W P_K, which acts on each row; `out` may be written to, where arrays can be."""
        return self.K(gradient.mT, None if out is None else out.mT).mT

    def left(self, X: Array, out: Array | None = None) -> Array:
        """P_C X, which acts on each column; `out` may be written to, where arrays can be."""
        return self.C(X, out)

    def rows(self, j: slice) -> Preconditioner:
        """The preconditioner of the rows `j` of ∇W, whole blocks of `C.L.blocks_of` rows."""
        C, scale = self.C, self.C.scale
        C = Side(C.L.part(j), C.whole, None if scale is None else scale[j])
        return dataclasses.replace(self, C=C)
