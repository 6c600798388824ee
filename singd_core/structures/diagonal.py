"""Diagonal matrices: with them an update costs what a first-order optimizer costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from singd_core._array import (
    Array,
    Scalar,
    append_ones,
    cast,
    expand,
    eye,
    full,
    namespace,
    sum_of_squares,
    sums_of_squares,
    times,
    widen,
)
from singd_core.structures.base import Structure, structure
from singd_core.structures.pattern import Pattern


@structure
class Diagonal(Pattern):
    """Diagonal: d numbers, every operation O(d n).

    Attributes:
        diag: Shape (..., d).
    """

    diag: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.diag.shape, self.diag.shape[-1])

    @classmethod
    def numbers(cls, d: int) -> int:
        return d

    @classmethod
    def width(cls, d: int) -> int:
        return min(1, d)

    @classmethod
    def restrict(cls, M: Array) -> Self:
        return cls(namespace(M).linalg.diagonal(M))

    project = restrict

    def dense(self) -> Array:
        return self.diag[..., None] * eye(self.diag.shape[-1], like=self.diag)

    @classmethod
    def identity(cls, d: int, *, like: Array, batch: Sequence[int] = ()) -> Self:
        return cls(full((*batch, d), 1.0, like=like))

    @classmethod
    def outer(cls, X: Array) -> Self:
        return cls(namespace(X).astype(sum_of_squares(X, 1), X.dtype))

    def congruence(self, X: Array) -> Self:
        """diag(Lᵀ X Xᵀ L), without the scaled copy of `X`."""
        return type(self)(self.diag * self.diag * self.outer(X).diag)

    def measured(self, A: Array) -> tuple[Self, Array]:
        squares, total = _sums_and_total(A)
        return type(self)(self.diag * self.diag * cast(squares, A)), total

    @classmethod
    def summed(cls, A: Array, c: float, last: float | None = None) -> Self:
        squares = sums_of_squares(A)
        if last is not None:
            squares = append_ones(squares, squares.ndim - 1, A.shape[-2] * last * last)
        return cls(cast(squares * c, A))

    @classmethod
    def sums(cls) -> type[Structure]:
        return cls

    def seen(self, U: Structure) -> Self:
        return type(self)(self.diag * self.diag * U.diag)  # type: ignore[attr-defined]

    def row_norms(self) -> Array:
        return abs(widen(self.diag))

    @property
    def blocks_of(self) -> int | None:
        return 1 if self.diag.ndim == 1 else None

    def part(self, j: slice) -> Self:
        return type(self)(self.diag[..., j])

    def scale_rows(self, c: Array) -> Self:
        return type(self)(self.diag * c)

    def gram(self) -> Self:
        return self.square()

    def matmul(self, other: Self) -> Self:
        return type(self)(self.diag * other.diag)

    def apply(self, X: Array) -> Array:
        return self.diag[..., None] * X

    apply_t = apply

    def apply_into(self, X: Array, out: Array) -> Array:
        return times(self.diag[..., None], X, out)

    def precondition(self, X: Array) -> Array:
        return self.square().apply(X)

    def square(self) -> Self:
        return type(self)(self.diag * self.diag)

    def add_identity(self, c: Scalar) -> Self:
        return type(self)(self.diag + expand(c, self.diag))

    def trace(self) -> Array:
        return namespace(self.diag).sum(widen(self.diag), axis=-1)


def _sums_and_total(A: Array) -> tuple[Array, Array]:
    """The sums of squares over rows, shape (..., d), and over all, in at least float32.

    Both from one pass, along the axis that the rows have: for two XLA would write A ∘ A to memory,
    and along the axis of Aᵀ a copy of it, 8 and 2 % at the peak. The 1-norm is their sum: XLA makes
    of a sum of sums a second pass over A ∘ A, which it then keeps (2 %).
    """
    squares = sums_of_squares(A)
    return squares, namespace(A).linalg.vector_norm(squares, ord=1, axis=-1)
