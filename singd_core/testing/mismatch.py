"""The error of two results that differ, and how it shows them."""

from __future__ import annotations

import numpy as np


class MismatchError(AssertionError):
    """Two results that should be equal are not."""


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


def difference(expected: np.ndarray, got: np.ndarray, how: str) -> str:
    """Both arrays, or the first places in which they differ if they are large."""
    if expected.size > 150 and expected.shape == got.shape:
        places = np.argwhere(expected != got)
        lines = [
            f"  at {list(map(int, i))}: {expected[tuple(i)]:.7g}, got {got[tuple(i)]:.7g}"
            for i in places[:5]
        ]
        return f"expected ({how}), in {len(places)} places of {expected.size}\n" + "\n".join(lines)
    return f"expected ({how})\n{indent(show(expected))}\ngot\n{indent(show(got))}"


def indent(text: str) -> str:
    """The text, two columns to the right."""
    return "  " + text.replace("\n", "\n  ")
