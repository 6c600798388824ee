"""What a refresh is told of a layer's curvature, and the running averages it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

from singd_core._array import (
    Array,
    Scalar,
    cast,
    namespace,
    ranged,
    sum_of_squares,
    wide_full,
    widen,
)
from singd_core._scalars import as_array, at_least, number, where
from singd_core._settings import Rate, Settings
from singd_core._tree import Tree, tree
from singd_core.structures.base import Structure

TINY = 2.0**-126  # the smallest normal number of float32, in all dtypes


class Rates(NamedTuple):
    """The numbers of one refresh, of the batch axes' shape, or of many matrices in a row.

    Attributes:
        averages: The new averages.
        damping: λ_K and λ_C.
        start: What K and C are multiplied by before they step: 1 from the second refresh on, unless
            their curvature has outgrown them.
        beta: β₁.
    """

    averages: Averages
    damping: tuple[Scalar, Scalar]
    start: tuple[Scalar, Scalar]
    beta: Scalar


@tree
class Measured(Tree):
    """Sums over the rows X of one factor, which add up over micro-batches and uses of a weight.

    Attributes:
        S: Π̂(Lᵀ XᵀX L), with L the matrix that the update measures with.
        squares: ‖X‖² per batch index, in at least float32.
    """

    S: Structure
    squares: Array

    def __add__(self, other: Self) -> Self:
        """The sums over both sets of rows, in at least float32: bfloat16 stops counting at 256."""
        return self.map(lambda a, b: widen(a) + widen(b), other)


def measure(L: Structure, rows: Array, *, identity: bool = False) -> Measured:
    """The sums of rows, shape (..., n, d), in the dtype of `L`; `identity` measures with L = I."""
    X = ranged(cast(rows, L.like))
    if identity:
        return Measured(L.outer(X.mT), sum_of_squares(X, 2))
    return Measured(*L.astype(X).measured(X))


def seen(L: Structure, measured: Measured) -> Measured:
    """The sums of rows with L, from those with L = I in the structure `L.sums()`."""
    return Measured(L.astype(measured.S.like).seen(measured.S), measured.squares)


def shares(N: Scalar, M: Scalar, d_in: int, d_out: int) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """What the sums of N inputs and of the output gradients of M terms are multiplied by.

    Returns:
        The factors of the sums, of inputs and of outputs, and of their mean diagonals.
    """
    if isinstance(N, (int, float)):
        N = N or 1
    else:  # counted on the device, where there may be none
        N = namespace(N).where(N > 0, N, namespace(N).ones_like(N))
    return 1.0 / N, M, 1.0 / (N * max(1, d_in)), M / max(1, d_out)


@tree
class Curvature(Tree):
    """The curvature U ⊗ G of one layer as a refresh wants it.

    Attributes:
        H_K: Π̂(Kᵀ U K), with the K of the state it will update (for KFAC Π̂(U)).
        H_C: Π̂(Cᵀ G C).
        t_U: The mean diagonal entry of U, of the batch axes' shape, in at least float32.
        t_G: The mean diagonal entry of G.
    """

    H_K: Structure
    H_C: Structure
    t_U: Array
    t_G: Array

    @classmethod
    def of(cls, inputs: Measured, N: Scalar, outputs: Measured, M: Scalar) -> Self:
        """From the sums of N rows of inputs, and of output gradients of a mean over M terms."""
        a, b, c, d = shares(N, M, inputs.S.shape[-1], outputs.S.shape[-1])
        return cls(inputs.S.scale(a), outputs.S.scale(b), inputs.squares * c, outputs.squares * d)

    def joined(self, other: Self) -> Self:
        """One Kronecker product near the sum of two, U ⊗ G + U' ⊗ G', for a weight of two roles.

        (U + s U') ⊗ (G + G'/s) has two terms too many; s makes the sum of their traces least.
        """
        xp, one = namespace(self.t_U), self.t_U * 0.0 + 1.0
        ratio = (self.t_U * other.t_G) / xp.where(other.t_U > 0.0, other.t_U * self.t_G, one)
        s = xp.where((self.t_G > 0.0) & (ratio > 0.0), xp.sqrt(ratio), one)
        return type(self)(
            self.H_K.add_scaled(s, other.H_K),
            self.H_C.add_scaled(1.0 / s, other.H_C),
            self.t_U + other.t_U * s,
            self.t_G + other.t_G / s,
        )


@tree
class Averages(Tree):
    """Running mean diagonals of U and G, and the number k of refreshes, of the batch axes' shape.

    Arrays and not numbers: a refresh without a finite, non-zero curvature must leave them alone
    without the host waiting to know.
    """

    t_U: Array
    t_G: Array
    k: Array

    @classmethod
    def zeros(cls, batch: Sequence[int], like: Array) -> Self:
        """Before the first refresh, on the device of `like`."""
        return cls(*(wide_full(batch, 0.0, like=like) for _ in range(3)))

    def read(self, curvature: Curvature) -> tuple[Self, Curvature]:
        """Both with numbers in place of 0-d arrays, where the host need not wait for them."""
        t_U, t_G = cast(curvature.t_U, self.t_U), cast(curvature.t_G, self.t_G)
        curvature = dataclasses.replace(curvature, t_U=number(t_U), t_G=number(t_G))
        return self.map(number), curvature

    def written(self, averages: Self) -> Self:
        """What came of `read`, as arrays like these."""
        return self.map(lambda old, new: as_array(new, old), averages)

    def rates(self, t_U: Scalar, t_G: Scalar, lr_cov: Rate, s: Settings) -> Rates:
        """The numbers of a refresh with curvature of these mean diagonals."""
        usable = self._usable(t_U, t_G, s)
        new = self._update(t_U, t_G, usable, lr_cov)
        damping = new.damping(s)
        start = self._start(*damping, new, s)
        return Rates(new, damping, start, self._step_size(usable, lr_cov, s))

    def _usable(self, t_U: Scalar, t_G: Scalar, s: Settings) -> Array | bool:
        """Where a curvature is usable: all-zero rows have no scale, and start K at infinity."""
        if s.relative_damping or s.scaled_start:
            # below it the inverse overflows
            return (t_U > TINY) & (t_G > TINY)
        return self.k >= 0.0  # always

    def _update(self, t_U: Scalar, t_G: Scalar, usable: Array | bool, lr_cov: Rate) -> Self:
        """Average the new mean diagonals: equal weights at first, then forgetting at `lr_cov`."""
        k = self.k + 1.0
        weight = where(usable, at_least(1.0 / k, lr_cov), 0.0)
        t_U = self.t_U + weight * (t_U - self.t_U)
        t_G = self.t_G + weight * (t_G - self.t_G)
        return type(self)(t_U, t_G, where(usable, k, self.k))

    def _step_size(self, usable: Array | bool, lr_cov: Rate, s: Settings) -> Scalar:
        """β₁ of refresh k: at least min(½, 1/(k + 1)) with early averaging; 0 without curvature."""
        beta = self.k * 0.0 + lr_cov
        if s.early_averaging:
            beta = at_least(beta, 1.0 / at_least(self.k + 1.0, 2.0))
        return where(usable, beta, 0.0)

    def damping(self, s: Settings) -> tuple[Scalar, Scalar]:
        """λ_K and λ_C: `damping` itself, or that share of the mean diagonals."""
        if s.relative_damping:
            return s.damping * self.t_U, s.damping * self.t_G
        return s.damping, s.damping

    def _start(
        self, lambda_K: Scalar, lambda_C: Scalar, new: Averages, s: Settings
    ) -> tuple[Scalar, Scalar]:
        """The scales by which the first refresh multiplies the identity at which K and C start."""
        if not s.scaled_start:
            return 1.0, 1.0
        first = (self.k == 0.0) & (new.k > 0.0)
        K_start = where(first, new.t_U + lambda_K, 1.0) ** -0.5
        C_start = where(first, new.t_G + lambda_C, 1.0) ** -0.5
        return K_start, C_start
