"""Triangular Toeplitz matrices: d numbers, every product a convolution by FFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from singd_core._array import (
    Array,
    Scalar,
    cast,
    concat,
    cumulative_sum,
    device,
    expand,
    full,
    namespace,
    sum_of_squares,
    widen,
)
from singd_core.structures.base import Structure, structure


@structure
class _Toeplitz(Structure):
    """Entry j is the value on the j-th off-diagonal; entry 0 is the value on the diagonal."""

    upper: ClassVar[bool]

    entries: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.entries.shape, self.entries.shape[-1])

    @classmethod
    def numbers(cls, d: int) -> int:
        return d

    @classmethod
    def width(cls, d: int) -> int:
        return min(1, d)

    @classmethod
    def identity(cls, d: int, *, like: Array, batch: Sequence[int] = ()) -> Self:
        return cls(full((*batch, d), 0.0, like=like)).add_identity(1.0)

    @classmethod
    def project(cls, M: Array) -> Self:
        # Rows of length 2 d, read as rows of 2 d − 1, move by one each: diagonals turn upright.
        xp, d = namespace(M), M.shape[-1]
        padded = xp.concat([xp.flip(M, axis=-1), full(M.shape, 0.0, like=M)], axis=-1)
        flat = xp.reshape(padded, (*M.shape[:-2], 2 * d * d))[..., : d * (2 * d - 1)]
        upright = xp.reshape(flat, (*M.shape[:-2], d, 2 * d - 1))[..., d - 1 :]
        return cls._from_sums(xp.sum(widen(upright), axis=-2), M)

    @classmethod
    def _from_sums(cls, sums: Array, like: Array) -> Self:
        """Π̂ from the off-diagonals' sums: the diagonal's mean, and twice the others' means."""
        means = sums / _lengths(sums)
        return cls(cast(concat([means[..., :1], 2.0 * means[..., 1:]], axis=-1), like))

    @classmethod
    def outer(cls, X: Array) -> Self:
        """Π̂(X Xᵀ): the sums of the off-diagonals are the columns' autocorrelations."""
        xp, d = namespace(X), X.shape[-2]
        if X.shape[-1] == 0:  # torch's fft refuses empty arrays
            return cls(full(X.shape[:-1], 0.0, like=X))
        F = xp.fft.rfft(widen(X.mT), n=2 * d, axis=-1)
        real, imaginary = xp.real(F), xp.imag(F)  # F F* would be a copy of all of F
        power = xp.sum(real * real, axis=-2) + xp.sum(imaginary * imaginary, axis=-2)
        sums = xp.fft.irfft(xp.astype(power, F.dtype), n=2 * d, axis=-1)[..., :d]
        return cls._from_sums(sums, X)

    def gram(self) -> Self:
        """Π̂(LᵀL): off-diagonal j of LᵀL sums to Σₘ (d − j − m) cₘ cₘ₊ⱼ, a correlation."""
        c, d = widen(self.entries), self.entries.shape[-1]
        xp = namespace(c)
        F = xp.fft.rfft(c, n=2 * d, axis=-1)
        weighted = xp.fft.rfft(c * _lengths(c), n=2 * d, axis=-1)
        sums = xp.fft.irfft(xp.conj(F) * weighted, n=2 * d, axis=-1)[..., :d]
        return self._from_sums(sums, self.entries)

    def matmul(self, other: Self) -> Self:
        product = _convolve(self.entries, other.entries[..., None], adjoint=False)
        return type(self)(product[..., 0])

    def add_identity(self, c: Scalar) -> Self:
        first = self.entries[..., :1]
        return type(self)(concat([first + expand(c, first), self.entries[..., 1:]], axis=-1))

    def trace(self) -> Array:
        return widen(self.entries[..., 0]) * self.entries.shape[-1]

    def norm(self) -> Array:
        c, xp = widen(self.entries), namespace(self.entries)
        return xp.sqrt(sum_of_squares(c * xp.sqrt(_lengths(c)), 1))

    def row_norms(self) -> Array:
        c, xp = widen(self.entries), namespace(self.entries)
        norms = xp.sqrt(cumulative_sum(c * c))  # of rows with one entry, two, ..., all d
        return xp.flip(norms, axis=-1) if self.upper else norms

    def max_abs(self) -> Array:
        return namespace(self.entries).max(namespace(self.entries).abs(self.entries), axis=-1)

    @classmethod
    def restrict(cls, M: Array) -> Self:
        return cls(M[..., 0, :] if cls.upper else M[..., 0])

    def apply(self, X: Array) -> Array:
        return _convolve(self.entries, X, adjoint=self.upper)

    def apply_t(self, X: Array) -> Array:
        return _convolve(self.entries, X, adjoint=not self.upper)

    def dense(self) -> Array:
        """`project` the other way round."""
        c, xp = self.entries, namespace(self.entries)
        *batch, d = c.shape
        row = xp.concat([c, full(c.shape, 0.0, like=c)], axis=-1)[..., None, :]
        flat = xp.reshape(xp.broadcast_to(row, (*batch, d, 2 * d)), (*batch, 2 * d * d))
        T = xp.reshape(flat[..., : d * (2 * d - 1)], (*batch, d, 2 * d - 1))[..., :d]
        return T if self.upper else T.mT


@structure
class TrilToeplitz(_Toeplitz):
    """Lower triangular Toeplitz: d numbers, products O(n d log d).

    Attributes:
        entries: The first column, shape (..., d).
    """

    upper = False


@structure
class TriuToeplitz(_Toeplitz):
    """Upper triangular Toeplitz: d numbers, products O(n d log d).

    Attributes:
        entries: The first row, shape (..., d).
    """

    upper = True


def _lengths(c: Array) -> Array:
    """d, d − 1, ..., 1: the lengths of the off-diagonals, in the dtype and on the device of `c`."""
    d = c.shape[-1]
    return namespace(c).arange(d, 0, -1, dtype=c.dtype, device=device(c))


def _convolve(c: Array, X: Array, *, adjoint: bool) -> Array:
    """`L X` of the lower triangular Toeplitz `L` with first column `c`, or `Lᵀ X`.

    Shapes (..., d) and (..., d, n). Padded to 2 d, the circular convolution is the linear one.
    """
    xp, d = namespace(c), c.shape[-1]
    if X.shape[-1] == 0:
        return X
    F = xp.fft.rfft(widen(c), n=2 * d, axis=-1)[..., None, :]
    # along the last axis, since torch copies what it transforms along another
    product = xp.fft.rfft(widen(X.mT), n=2 * d, axis=-1)
    product *= xp.conj(F) if adjoint else F
    return cast(xp.fft.irfft(product, n=2 * d, axis=-1)[..., :d].mT, X)
