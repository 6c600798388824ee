"""One case of a law: what it draws, and how it compares with the oracle, NumPy in float64.

A member is the structure's own restriction of a random matrix, so a user writes no strategy. The
matrices hold small integers, few of them not zero: sums stay below 256, the integer up to
which bfloat16 holds all, and an operation that only multiplies and adds is right to the last bit in
every dtype. Float data, and operations that round already in NumPy float64 (fft, means, norms), are
compared with a tolerance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from singd_core._array import Array
from singd_core._tree import Tree
from singd_core.structures.base import Structure
from singd_core.testing.backends import EPS, Backend
from singd_core.testing.mismatch import MismatchError, difference

# up to these, every integer is a number of the dtype
INTEGERS = {"float64": 2.0**53, "float32": 2.0**24, "bfloat16": 256.0, "float16": 2048.0}

# hypothesis draws 8 kB an example: a larger array holds each of so many numbers several times
MOST = 128


@functools.cache
def integers(d: int) -> np.ndarray:
    """The number that each byte stands for: of random bytes about four in a row of d are not 0.

    A byte of 0 is 0, and smaller bytes are simpler numbers: what hypothesis shrinks towards.
    """
    table = np.zeros(256)
    table[1:5] = 1.0, -1.0, 2.0, -2.0
    others = round(256 * min(0.7, 4.0 / (d + 1)))
    table[256 - others :] = np.resize([-2.0, -1.0, -1.0, 1.0, 1.0, 2.0], others)
    return table


# as `integers`, of a normal distribution
FLOATS = np.array([0.0, *(NormalDist().inv_cdf(i / 256) for i in range(1, 256))])


def near_side(S: type[Structure], d: int) -> int | None:
    """The smallest side of the structure from d on, else the largest below, else None."""
    return next(filter(S.has_side, (*range(d, 4 * d + 64), *range(d - 1, 0, -1))), None)


@dataclass
class Case:
    """What a law is checked with.

    Attributes:
        S: The structure.
        backend: The array library.
        dtype: The dtype of all that is drawn.
        d: The side of the matrices.
        columns: The number of columns of a tall array.
        bytes: Draws so many bytes; each becomes a number.
        floats: Draw normal numbers in place of small integers.
        rounds: Whether the law holds only up to rounding, even where all is integer.
        drawn: What was drawn, by name and shape: the same is not drawn twice.
        members: The names under which members were drawn, of what they are the restriction.
        rounded: Whether a comparison came out equal only up to rounding.
    """

    S: type[Structure]
    backend: Backend
    dtype: str
    d: int
    bytes: Callable[[int], bytes]
    columns: int = 3
    floats: bool = False
    rounds: Callable[[], bool] = lambda: False
    drawn: dict[tuple[str, tuple[int, ...]], np.ndarray] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    rounded: bool = False

    # ---- drawing --------------------------------------------------------------------------------

    def numbers(self, name: str, *shape: int) -> np.ndarray:
        """Random numbers under a name, in NumPy."""
        if (name, shape) not in self.drawn:
            table, n = FLOATS if self.floats else integers(self.d), math.prod(shape)
            drawn = np.frombuffer(self.bytes(min(n, MOST)), dtype=np.uint8)
            if n > MOST:
                drawn = drawn[np.random.default_rng(n).integers(MOST, size=n)]
            self.drawn[name, shape] = table[drawn].reshape(shape)
        return self.drawn[name, shape]

    def array(self, name: str, *shape: int) -> Array:
        """Random numbers as an array of the backend."""
        return self.to(self.numbers(name, *shape))

    @property
    def d_out(self) -> int:
        """The side of C where d is the side of K: the next one, which is d + 1 if there is one."""
        return near_side(self.S, self.d + 1) or self.d

    def rows(self, name: str = "X", n: int | None = None, batch: tuple[int, ...] = ()) -> Array:
        """A tall array of shape (*batch, d, n), n being `columns` if None."""
        return self.array(name, *batch, self.d, self.columns if n is None else n)

    def symmetric(self, name: str = "M", batch: tuple[int, ...] = ()) -> Array:
        """A symmetric matrix, shape (*batch, d, d)."""
        upper = np.triu(self.numbers(name, *batch, self.d, self.d))
        return self.to(upper + np.triu(upper, 1).swapaxes(-1, -2))

    def member(self, name: str = "L", batch: tuple[int, ...] = ()) -> Structure:
        """A member of the structure, or a stack of them: the restriction of a random matrix."""
        self.members.add(name)
        return self.S.restrict(self.array(name, *batch, self.d, self.d))

    # ---- conversion -----------------------------------------------------------------------------

    def to(self, x: Any) -> Array:
        """An array of the backend in the dtype of the case."""
        return self.backend.to(np.array(x, dtype=np.float64, order="C"), self.dtype)

    def numpy(self, x: Any) -> np.ndarray:
        """A result in NumPy float64; of a structure its dense matrix."""
        if isinstance(x, Structure):
            x = x.dense()
        plain = isinstance(x, (np.ndarray, np.generic, int, float))
        return np.asarray(x, dtype=np.float64) if plain else self.backend.back(x)

    # ---- comparison -----------------------------------------------------------------------------

    def same(
        self,
        actual: Any,
        oracle: Callable[..., Any],
        *inputs: Any,
        exact: bool = True,
        scale: float = 0.0,
    ) -> None:
        """Compare a result with what `oracle` gives in NumPy float64 on the same inputs.

        Integers below the dtype's limit have to agree to the last bit, unless the operation rounds
        already in NumPy float64. All else has to agree up to 4 √(d + 4) roundings (of two to three
        sums of d terms, growing as a random walk does) of the oracle's value at absolute values,
        or of the product of the largest inputs: what fft's error is relative to.

        Args:
            actual: An array, or a structure that stands for its dense matrix.
            oracle: A function of NumPy arrays that multiplies and adds.
            *inputs: Its arguments: arrays, structures or numbers.
            exact: False if the operation always rounds.
            scale: A larger value that roundings are relative to.
        """
        arrays = [self.numpy(x) for x in inputs]
        expected, got = np.asarray(oracle(*arrays), dtype=np.float64), self.numpy(actual)
        if got.shape != expected.shape:
            raise MismatchError(f"expected shape {expected.shape}, got {got.shape}")
        if np.array_equal(got, expected):
            return
        self.rounded = True
        absolute = [np.abs(a) for a in arrays]
        bound = float(np.max(np.abs(oracle(*absolute)), initial=0.0))
        integers = all(np.array_equal(a, np.round(a)) for a in (*arrays, expected))
        if exact and integers and bound <= INTEGERS[self.dtype] and not self.rounds():
            raise MismatchError(difference(expected, got, "to the last bit, since all is integer"))
        largest = float(np.prod([np.max(a, initial=0.0) for a in absolute]))
        tolerance = 4.0 * (self.d + 4) ** 0.5 * EPS[self.dtype] * max(bound, largest, scale)
        if not np.max(np.abs(got - expected)) <= tolerance:
            raise MismatchError(difference(expected, got, f"up to {tolerance:.2g}"))

    def near(self, actual: Any, expected: Any, scale: float, what: str) -> None:
        """Compare two results that have to agree up to roundings, of a value of this scale."""
        try:
            self.same(actual, lambda x: x, expected, exact=False, scale=scale)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None

    def near_entry(self, i: int, stacked: Tree, alone: Tree) -> None:
        """Compare an entry of a stacked tree with what was computed of it alone."""
        pairs = zip(stacked.named_arrays(), alone.named_arrays(), strict=True)
        for (name, new), (_, old) in pairs:
            size = float(np.max(np.abs(self.numpy(old)), initial=1.0))
            self.near(new[i, ...], old, self.d * size, f"{name} at {i}")

    def equal(self, actual: Any, expected: Any, what: str = "") -> None:
        """Compare two results that have to agree to the last bit."""
        a, e = self.numpy(actual), self.numpy(expected)
        if a.shape != e.shape or not np.array_equal(a, e):
            raise MismatchError((f"{what}: " if what else "") + difference(e, a, "to the last bit"))
