"""Mistakes in the linear space and in products of members."""

from typing import Any

from array_api_compat import array_namespace, device
from planting import Blocks, Hierarchical, bug, library

from singd_core.structures import (
    Diagonal,
    Structure,
    Tril,
    TrilToeplitz,
    structure,
)


@bug("restriction_is_a_retraction")
class Doubled(Diagonal):
    @classmethod
    def restrict(cls, M):
        return cls(2.0 * array_namespace(M).linalg.diagonal(M))


@bug("restriction_is_linear")
class AbsoluteValues(Diagonal):
    @classmethod
    def restrict(cls, M):
        return cls(array_namespace(M).abs(array_namespace(M).linalg.diagonal(M)))


@bug("restriction_as_in_numpy", "numpy", "torch")
class OtherInTorch(Diagonal):
    @classmethod
    def restrict(cls, M):
        xp, diag = array_namespace(M), array_namespace(M).linalg.diagonal(M)
        if library(M) == "torch" and M.shape[-1] > 1:
            next_to_it = xp.linalg.diagonal(M, offset=1)
            diag = diag + xp.concat([next_to_it, xp.zeros_like(diag[..., :1])], axis=-1)
        return cls(diag)


@bug("shape")
class ShapeWithoutBatch(Diagonal):
    @property
    def shape(self):
        return (self.diag.shape[-1],) * 2


@bug("identity")
class StrictlyLower(Tril):
    @classmethod
    def restrict(cls, M):
        return cls(array_namespace(M).tril(M, k=-1))


@bug("identity")
class IdentityOfOnes(TrilToeplitz):
    @classmethod
    def identity(cls, d, *, like, batch=()):
        return cls(array_namespace(like).ones((*batch, d), dtype=like.dtype, device=device(like)))


@bug("sums")
class SumWithoutRemainder(Blocks):
    made_by = None

    def __add__(self, other):
        return type(self)(self.blocks + other.blocks, self.last)


@bug("sums")
class DifferenceTheOtherWay(Diagonal):
    def __sub__(self, other):
        return type(self)(other.diag - self.diag)


@bug("scalar_multiples")
class ScalesOneArray(Blocks):
    made_by = None

    def scale(self, c):
        return type(self)(self.blocks * c, self.last)


@bug("zero")
class ZeroIsFalse(Diagonal):
    def scale(self, c):
        return super().scale(1.0 if isinstance(c, float) and not c else c)


@bug("add_identity")
class AddsToEveryEntry(Tril):
    def add_identity(self, c):
        return self.map(lambda a: a + (c if isinstance(c, float) else c[..., None, None]))


@bug("shifted")
class ShiftedByNumbersAlone(Diagonal):
    def shifted(self, c):
        return super().shifted(c if isinstance(c, float) else 0.0)


@bug("closed_under_product")
@structure
class Banded(Structure):
    """Tridiagonal matrices."""

    matrix: Any

    @classmethod
    def restrict(cls, M):
        xp = array_namespace(M)
        return cls(xp.tril(xp.triu(M, k=-1), k=1))

    def dense(self):
        return self.matrix


@bug("product")
class ProductTheOtherWay(Tril):
    def matmul(self, other):
        return type(self)(other.matrix @ self.matrix)


@bug("product")
class BlocksMixedUp(Hierarchical):
    made_by = None

    def matmul(self, other):
        new = super().matmul(other)
        return type(self)(new.A, self.A.apply(other.B) + self.B, new.D)


@bug("associative")
class GarbageAboveTheDiagonal(Tril):
    def dense(self):
        return array_namespace(self.matrix).tril(self.matrix)

    def matmul(self, other):
        product = self.dense() @ other.dense()
        return type(self)(product + product.mT - array_namespace(product).tril(product.mT))

    def apply(self, X):
        return self.matrix @ X
