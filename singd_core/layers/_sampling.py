"""Some of the rows of a factor in place of all: a refresh then costs the same however many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from singd_core._array import Array, concat, device, namespace, take
from singd_core.structures.base import Structure

# An axis starts at these shares of its length times the step, modulo 1: the golden ratio and roots
# whose multiples fill the axis evenly, in 2⁻¹⁵. Odd, so that all 2¹⁵ starts come; small, so that
# the products fit into 32 bits, in which JAX counts steps.
_BITS = 15
_LAST = (1 << _BITS) - 1
_SHARES = (20251, 13573, 23987, 7735)  # (√5 − 1)/2, √2 − 1, √3 − 1, √5 − 2
AXES = len(_SHARES)  # further axes start with the first ones again


@dataclass(frozen=True)
class Sample:
    """About `most` rows of a factor, others at each step.

    Of n rows with numbers on a circle, m are taken at even strides from a start that the step
    decides. Every row is in as many of the n starts as any other, so rows times √(n/m) have the
    expected sums `AᵀA` of all rows. How many rows there are does not depend on the step.

    Attributes:
        most: How many rows.
        step: The number of steps taken, or a 0-d array of it where that is traced.
    """

    most: int
    step: Any = 0

    @classmethod
    def of(
        cls, rows: float | None, structure: type[Structure], d: int, step: Any = 0
    ) -> Sample | None:
        """At least as many rows as a factor of side `d` is wide; None, for all, if `rows` is."""
        if rows is None or rows == math.inf:
            return None
        return cls(max(int(rows), structure.width(d)), step)

    @classmethod
    def of_both(
        cls,
        rows: float | None,
        structures: Sequence[type[Structure]],
        shape: tuple[Any, int, int],
        step: Any,
    ) -> tuple[Sample | None, Sample | None]:
        """Those of K and of C, of a matrix of this shape."""
        _, d_out, d_in = shape
        K, C = structures
        return cls.of(rows, K, d_in, step), cls.of(rows, C, d_out, step)

    def counts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How many of the examples, and how many along each axis of positions, are kept.

        Both are thinned alike. Few positions of all examples would be the same ones, such as a
        corner that is black in every image; all positions of few examples are not independent.
        """
        n, left, counts = math.prod(lengths), float(self.most), []
        if n <= self.most:
            return tuple(lengths)
        for i, length in enumerate(lengths):
            axes = len(lengths) - i
            roots = min(axes, 2) if i == 0 else axes
            thinned = (math.prod(lengths[i:]) / left) ** (1 / roots)
            counts.append(min(length, max(1, round(length / thinned))))
            left /= counts[-1]
        return tuple(counts)

    def indices(self, n: int, m: int, like: Array, *, axis: int = 0) -> Array:
        """`m` of the indices below `n`, on the device of `like`.

        Args:
            n: The length of the axis.
            m: How many.
            like: An array.
            axis: The number of the axis among those that are thinned: each has its own starts.
        """
        strides = stride(n, m) * namespace(like).arange(m, device=device(like))
        return (self.start(n, axis) + strides) % n

    def start(self, n: int, axis: int = 0) -> Any:
        """Which of `n` indices is the first one, along the axis of this number."""
        share, whole, rest = self.share(axis), n >> _BITS, n & _LAST
        return share * whole + ((share * rest) >> _BITS)  # share · n / 2¹⁵ in 32 bits

    def share(self, axis: int) -> Any:
        """The share of its length that the axis of this number starts at, in 2⁻¹⁵."""
        return ((self.step & _LAST) * _SHARES[axis % AXES]) & _LAST

    def take(self, x: Array, m: int, axis: int = 0, *, number: int = 0) -> tuple[Array, float]:
        """`m` entries of `x` along an axis, and what they have to be multiplied by.

        `number` counts the axes that are thinned.
        """
        n = x.shape[axis]
        if m >= n:
            return x, 1.0
        start, factor = self.start(n, number), (n / m) ** 0.5
        if not isinstance(start, int):
            return take(x, self.indices(n, m, x, axis=number), axis), factor
        # The same with one kernel in place of five.
        index = (slice(None),) * axis
        slices = _slices(n, m, start, stride(n, m))
        return concat([x[(*index, part, ...)] for part in slices], axis=axis), factor

    def rows(self, x: Array) -> tuple[Array, float]:
        """Of `x`, shape `(batch, *shared, d)`, rows `(m, d)` of any positions, and their factor."""
        n, d = math.prod(x.shape[:-1]), x.shape[-1]
        x = x if x.ndim == 2 else namespace(x).reshape(x, (n, d))
        return self.take(x, self.most)


def stride(n: int, m: int) -> int:
    """Near n/m, so that m strides go round about once, and without a common factor with n.

    So no index comes twice. And rows of all positions come, where n counts the positions of all
    examples, also if a model has made one axis of both by itself.
    """
    if m >= n:
        return 1
    near = round(n / m)
    further = (k for i in count() for k in (near + i, near - i))  # rather more than once
    return next(k for k in further if k > 1 and math.gcd(k, n) == 1)


def _slices(n: int, m: int, start: int, stride: int) -> Iterator[slice]:
    """The indices from `start` at equal strides, round after round."""
    while m > 0:
        here = min(m, -(-(n - start) // stride))
        stop = start + here * stride
        yield slice(start, stop - stride + 1, stride if here > 1 else 1)
        m, start = m - here, stop - n
