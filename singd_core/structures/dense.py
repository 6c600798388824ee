"""Dense matrices, and dense triangular ones."""

from __future__ import annotations

from typing import ClassVar, Self

from singd_core._array import (
    Array,
    Scalar,
    add_diagonal,
    append_ones,
    concat,
    namespace,
    product,
)
from singd_core.structures.base import structure
from singd_core.structures.pattern import Pattern


@structure
class _Square(Pattern):
    """Stored as one d × d array."""

    matrix: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    @classmethod
    def numbers(cls, d: int) -> int:
        return d * d

    def dense(self) -> Array:
        return self.matrix

    def apply_into(self, X: Array, out: Array) -> Array:
        return product(self.matrix, X, out)

    @classmethod
    def summed(cls, A: Array, c: float, last: float | None = None) -> Self:
        n, d = A.shape[-2:]
        if last is None or n < 2 * d:
            return super().summed(A, c, last)
        # [[AᵀA, Aᵀ1], [1ᵀA, n]]: with a column of ones A is copied, which is more than AᵀA
        ends, corner = namespace(A).sum(A, axis=-2)[..., None, :] * last, n * last * last
        ends = append_ones(ends, A.ndim - 1, corner)
        XX = concat([concat([A.mT @ A, ends[..., :-1]], axis=-2), ends.mT], axis=-1)
        return cls.project(XX * c)

    def scale_rows(self, c: Array) -> Self:
        return type(self)(self.matrix * c[..., None])

    def matmul(self, other: Self) -> Self:
        return type(self)(self.matrix @ other.matrix)

    def shifted(self, c: Scalar) -> Self:
        return type(self)(add_diagonal(self.matrix, c))

    def square(self) -> Dense:
        return Dense(self.matrix @ self.matrix.mT)

    def congruence(self, X: Array) -> Self:
        """Π̂(Lᵀ X Xᵀ L), by the order of products that costs less.

        `LᵀX` first multiplies 2 n d² numbers, `X Xᵀ` first n d² + 2 d³: the same at n = 2 d. There
        the latter needs a third less memory, d² in place of n d numbers, so it begins a bit sooner.
        """
        d, n = X.shape[-2:]
        if 2 * n <= 3 * d:
            return self.outer(self.matrix.mT @ X)
        return self.project(self.matrix.mT @ (X @ X.mT) @ self.matrix)


@structure
class Dense(_Square):
    """Any matrix: d² numbers. Π̂ is the identity, so SINGD with dense factors is INGD.

    Attributes:
        matrix: Shape (..., d, d).
    """

    matrix: Array

    @classmethod
    def restrict(cls, M: Array) -> Self:
        return cls(M)

    project = restrict


class _Triangular(_Square):
    """Held in d² numbers. Π̂ doubles the entries beside the diagonal."""

    upper: ClassVar[bool]

    @classmethod
    def restrict(cls, M: Array, k: int = 0) -> Self:
        xp = namespace(M)
        return cls(xp.triu(M, k=k) if cls.upper else xp.tril(M, k=-k))

    @classmethod
    def project(cls, M: Array) -> Self:
        return cls.restrict(M) + cls.restrict(M, 1)


@structure
class Tril(_Triangular):
    """Lower triangular, held in d² numbers. Π̂ doubles the entries below the diagonal.

    Attributes:
        matrix: Shape (..., d, d), zero above the diagonal.
    """

    upper = False


@structure
class Triu(_Triangular):
    """Upper triangular, held in d² numbers. Π̂ doubles the entries above the diagonal.

    Attributes:
        matrix: Shape (..., d, d), zero below the diagonal.
    """

    upper = True
