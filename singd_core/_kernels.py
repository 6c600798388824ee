"""What the arrays of a library do in their own way, said by a frontend once for each type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Operations that one type of arrays does in place, as one kernel, or without a wait.

    Each stands for the function of its name in `singd_core._array` or `singd_core._scalars`, and
    takes the same arguments. What is None is done by operations of the standard.

    Attributes:
        multiply_add: x c + y; `out` may be written to.
        add_product: Y + A B; Y may be written to.
        add_diagonal: A + c I; A may be written to.
        product: A B, written to `out`.
        times: A * B, written to `out`.
        take: Entries along an axis.
        inverse: The inverse of a matrix.
        sums_of_squares: Sums of squares over rows.
        cumulative_sum: The sums of the first entries along the last axis.
        norm: The Frobenius norm over last axes, or the norms of the matrices of a list.
        constant: An array of one number everywhere.
        maximum: The larger of an array and a number, NaN where the array is.
        minimum: The smaller, likewise.
        number: A 0-d array as a number, where the host need not wait for it.
        numbers: A 1-d array as a list of numbers, likewise; None where it is no such array.
        empty: An array of any content, where arrays can be written to.
        is_view: Whether an array is in the memory of another.
        fuse: A function that runs a chain of operations as one kernel, of that chain.
    """

    multiply_add: Callable[[Any, Any, Any, Any], Any] | None = None
    add_product: Callable[[Any, Any, Any], Any] | None = None
    add_diagonal: Callable[[Any, Any], Any] | None = None
    product: Callable[[Any, Any, Any], Any] | None = None
    times: Callable[[Any, Any, Any], Any] | None = None
    take: Callable[[Any, Any, int], Any] | None = None
    inverse: Callable[[Any], Any] | None = None
    sums_of_squares: Callable[[Any], Any] | None = None
    cumulative_sum: Callable[[Any], Any] | None = None
    norm: Callable[[Any, int], Any] | None = None
    constant: Callable[[float, Any], Any] | None = None
    maximum: Callable[[Any, float], Any] | None = None
    minimum: Callable[[Any, float], Any] | None = None
    number: Callable[[Any], Any] | None = None
    numbers: Callable[[Any], list[float] | None] | None = None
    empty: Callable[[Sequence[int], Any], Any] | None = None
    is_view: Callable[[Any, Any], bool] | None = None
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


_STANDARD = Kernels()
_KERNELS: dict[type, Kernels] = {
    int: _STANDARD,  # torch.compile finds no others
    float: _STANDARD,
    # the clip of NumPy does not know bfloat16
    np.ndarray: Kernels(maximum=np.maximum, minimum=np.minimum),
}
_FOUND = dict(_KERNELS)  # of these types, and of others that were asked for


def register(kernels: Kernels, *types: type) -> None:
    """Let arrays of these types use these kernels."""
    for kind in types:
        _KERNELS[kind] = kernels
    _FOUND.clear()
    _FOUND.update(_KERNELS)


def kernels_of(x: Any) -> Kernels:
    """The kernels of an array's type, or of the first that it inherits from."""
    kind = type(x)
    if kind not in _FOUND:
        known = (_KERNELS[base] for base in kind.__mro__ if base in _KERNELS)
        _FOUND[kind] = next(known, _STANDARD)
    return _FOUND[kind]
