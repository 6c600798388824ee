"""The product that makes a natural gradient of a gradient."""

from __future__ import annotations

import dataclasses

from singd_core._array import Array, cast
from singd_core.structures.base import Structure
from singd_core.structures.diagonal import Diagonal


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """∇W ↦ P_C ∇W P_K, the natural gradient of ∇W, shape (..., d_out, d_in), in the dtype of C.

    Attributes:
        K: A factor with P_K = K Kᵀ, unless P_K is given.
        P_K: P_K itself, or None.
        C: A factor with P_C = C Cᵀ, unless P_C is given.
        P_C: P_C itself, or None.
    """

    K: Structure
    P_K: Structure | None
    C: Structure
    P_C: Structure | None

    def __call__(self, gradient: Array) -> Array:
        """The natural gradient."""
        return self.left(self.right(gradient))

    def right(self, gradient: Array) -> Array:
        """∇W P_K, which acts on each row."""
        return _product(self.K, self.P_K, cast(gradient, self.K.like).mT).mT

    def left(self, X: Array) -> Array:
        """P_C X, which acts on each column."""
        return _product(self.C, self.P_C, cast(X, self.C.like))

    def rows(self, j: slice) -> Preconditioner | None:
        """The one of the rows `j` of ∇W alone, or None where P_C mixes rows. Not of a stack."""
        if not isinstance(self.C, Diagonal):
            return None
        return dataclasses.replace(self, C=Diagonal(self.C.diag[j]), P_C=None)


def _product(L: Structure, P: Structure | None, X: Array) -> Array:
    return L.precondition(X) if P is None else P.apply(X)
