"""The product that makes a natural gradient of a gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, Self, TypeVar

from singd_core._array import Array, at_least, cast, number
from singd_core.structures.base import Structure
from singd_core.structures.diagonal import Diagonal
from singd_core.updates.curvature import TINY

S = TypeVar("S", bound=Structure)


class _Pair(Protocol):
    @property
    def K(self) -> Structure: ...  # noqa: N802

    @property
    def C(self) -> Structure: ...  # noqa: N802


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """∇W ↦ P_C ∇W P_K, the natural gradient of ∇W, shape (..., d_out, d_in), in the dtype of C.

    Attributes:
        K: P_K, or a factor with P_K = K Kᵀ.
        whole_K: Whether it is P_K.
        C: P_C, or a factor with P_C = C Cᵀ.
        whole_C: Whether it is P_C.
    """

    K: Structure
    whole_K: bool
    C: Structure
    whole_C: bool

    @classmethod
    def of(cls, P_K: Structure | None, P_C: Structure | None, factors: _Pair) -> Self:
        """With P_K and P_C where they are known, and else with the factors."""
        return cls(P_K or factors.K, P_K is not None, P_C or factors.C, P_C is not None)

    def __call__(self, gradient: Array) -> Array:
        """The natural gradient."""
        return self.left(self.right(gradient))

    def right(self, gradient: Array, out: Array | None = None) -> Array:
        """∇W P_K, which acts on each row; `out` may be written to, where arrays can be."""
        out = None if out is None else out.mT
        return _product(self.K, self.whole_K, cast(gradient, self.K.like).mT, out).mT

    def left(self, X: Array, out: Array | None = None) -> Array:
        """P_C X, which acts on each column; `out` may be written to, where arrays can be."""
        return _product(self.C, self.whole_C, cast(X, self.C.like), out)

    def rows(self, j: slice) -> Preconditioner | None:
        """The one of the rows `j` of ∇W alone, or None where P_C mixes rows. Not of a stack."""
        if not isinstance(self.C, Diagonal):
            return None
        return dataclasses.replace(self, C=Diagonal(self.C.diag[j]))


def _product(L: Structure, whole: bool, X: Array, out: Array | None) -> Array:
    if not whole:
        return L.precondition(X)
    found = None if out is None else L.apply_into(X, out)
    return L.apply(X) if found is None else found


def of_unit_scale(L: S) -> S:
    """The matrix, or each of a stack, scaled to the norm that the identity has."""
    return L.scale(math.sqrt(L.shape[-1]) / at_least(number(L.norm()), TINY))
