"""One case of a law: what it draws, and how it compares with the oracle, NumPy in float64.

A member is the structure's own restriction of a random matrix, so a user writes no strategy. The
matrices hold small integers of which few are not zero: sums stay below 256, the integer up to
which bfloat16 holds all, and an operation that only multiplies and adds is right to the last bit in
every dtype. Float data, and operations that round already in NumPy float64 (fft, means, norms), are
compared with a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from singd_core._array import Array
from singd_core.structures.base import Structure
from singd_core.testing.backends import EPS, Backend

# up to these, every integer is a number of the dtype
INTEGERS = {"float64": 2.0**53, "float32": 2.0**24, "bfloat16": 256.0, "float16": 2048.0}


class MismatchError(AssertionError):
    """Two results that should be equal are not."""


@dataclass
class Case:
    """What a law is checked with.

    Attributes:
        S: The structure.
        backend: The array library.
        dtype: The dtype of all that is drawn.
        d: The side of the matrices.
        seed: Of the draws.
        floats: Draw normal numbers in place of small integers.
        exact: The law holds to the last bit where all is integer.
        drawn: What was drawn, by name; what is here already is not drawn anew.
        rounded: Whether a comparison came out equal only up to rounding.
    """

    S: type[Structure]
    backend: Backend
    dtype: str
    d: int
    seed: tuple[int, ...] = (0,)
    floats: bool = False
    exact: bool = True
    drawn: dict[str, np.ndarray] = field(default_factory=dict)
    rounded: bool = False

    # ---- drawing --------------------------------------------------------------------------------

    def numbers(self, name: str, *shape: int) -> np.ndarray:
        """Random numbers under a name, in NumPy."""
        if name not in self.drawn:
            rng = np.random.default_rng([*self.seed, len(self.drawn)])
            if self.floats:
                new = rng.standard_normal(shape)
            else:
                share = min(0.7, 4.0 / (self.d + 1))
                new = rng.choice([-2.0, -1.0, -1.0, 1.0, 1.0, 2.0], shape) * (
                    rng.random(shape) < share
                )
            self.drawn[name] = new
        return self.drawn[name]

    def array(self, name: str, *shape: int) -> Array:
        """Random numbers as an array of the backend."""
        return self.to(self.numbers(name, *shape))

    def rows(self, name: str = "X", n: int = 3, batch: tuple[int, ...] = ()) -> Array:
        """A tall array of shape (*batch, d, n)."""
        return self.array(name, *batch, self.d, n)

    def symmetric(self, name: str = "M", batch: tuple[int, ...] = ()) -> Array:
        """A symmetric matrix, shape (*batch, d, d)."""
        upper = np.triu(self.numbers(name, *batch, self.d, self.d))
        return self.to(upper + np.triu(upper, 1).swapaxes(-1, -2))

    def member(self, name: str = "L", batch: tuple[int, ...] = ()) -> Structure:
        """A member of the structure, or a stack of them: the restriction of a random matrix."""
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
        """Compare a result with that of `oracle` in NumPy float64 on the same inputs.

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
        if exact and self.exact and integers and bound <= INTEGERS[self.dtype]:
            raise MismatchError(_difference(expected, got, "to the last bit, since all is integer"))
        largest = float(np.prod([np.max(a, initial=0.0) for a in absolute]))
        tolerance = 4.0 * (self.d + 4) ** 0.5 * EPS[self.dtype] * max(bound, largest, scale)
        if not np.max(np.abs(got - expected)) <= tolerance:
            raise MismatchError(_difference(expected, got, f"up to {tolerance:.2g}"))

    def equal(self, actual: Any, expected: Any, what: str = "") -> None:
        """Compare two results that have to agree to the last bit."""
        a, e = self.numpy(actual), self.numpy(expected)
        if a.shape != e.shape or not np.array_equal(a, e):
            raise MismatchError(
                (f"{what}: " if what else "") + _difference(e, a, "to the last bit")
            )


def require(condition: bool, message: str) -> None:
    """Raise a mismatch with a message unless the condition holds."""
    if not condition:
        raise MismatchError(message)


def show(x: np.ndarray) -> str:
    """An array in few characters: all integers if it holds nothing else, without zeros if large."""
    if x.size and np.all(np.isfinite(x)) and np.array_equal(x, np.round(x)):
        x = x.astype(np.int64)
    if x.size > 150 and np.count_nonzero(x) <= 20:
        places = [f"{list(map(int, i))}: {x[tuple(i)]:.5g}" for i in np.argwhere(x)]
        return f"zero, shape {x.shape}" + (", but for " if places else "") + ", ".join(places)
    return np.array2string(x, precision=4, threshold=150, edgeitems=3)


def _difference(expected: np.ndarray, got: np.ndarray, how: str) -> str:
    if expected.size > 150 and expected.shape == got.shape:
        places = np.argwhere(expected != got)
        lines = [
            f"  at {list(map(int, i))}: {expected[tuple(i)]:.7g}, got {got[tuple(i)]:.7g}"
            for i in places[:5]
        ]
        return f"expected ({how}), in {len(places)} places of {expected.size}\n" + "\n".join(lines)
    return f"expected ({how})\n{_indent(show(expected))}\ngot\n{_indent(show(got))}"


def _indent(text: str) -> str:
    return "  " + text.replace("\n", "\n  ")
