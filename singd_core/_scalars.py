"""Functions of numbers: of Python numbers, or of arrays with a number for each of many matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from singd_core._array import Array, Scalar, cast, full, namespace
from singd_core._kernels import kernels_of


def number(x: Array) -> Scalar:
    """A 0-d array as a number where a frontend has said that the host need not wait for it.

    What follows is then no operation on arrays. An operation of torch takes 5 µs on a CPU, and some
    seventy of them took half of the time of a refresh of a small layer.
    """
    read = kernels_of(x).number
    return x if read is None else read(x)


def numbers(x: Array) -> Sequence[Scalar]:
    """The entries along the last axis, each as `number` has it."""
    read = kernels_of(x).numbers
    found = None if read is None else read(x)
    return [number(x[..., i]) for i in range(x.shape[-1])] if found is None else found


def as_array(x: Scalar, like: Array) -> Array:
    """The inverse of `number`: an array like the one that it came from."""
    return full(like.shape, x, like=like) if isinstance(x, (int, float)) else x


def at_least(x: Scalar, low: Scalar) -> Scalar:
    """max(x, low), NaN where x is, of numbers and arrays."""
    if isinstance(x, (int, float)) and isinstance(low, (int, float)):
        return max(x, low)
    if isinstance(low, (int, float)):  # one operation, where an array of it would be another
        own = kernels_of(x).maximum
        return namespace(x).clip(x, min=low) if own is None else own(x, low)
    x, low = _alike(x, low)
    return namespace(x).maximum(x, low)


def at_most(x: Scalar, high: Scalar) -> Scalar:
    """min(x, high), NaN where x is, of numbers and arrays."""
    if isinstance(x, (int, float)) and isinstance(high, (int, float)):
        return min(x, high)
    if isinstance(high, (int, float)):
        own = kernels_of(x).minimum
        return namespace(x).clip(x, max=high) if own is None else own(x, high)
    x, high = _alike(x, high)
    return namespace(x).minimum(x, high)


def clip(x: Scalar, low: float, high: Scalar) -> Scalar:
    """min(max(x, low), high) of a number or an array."""
    is_number = isinstance(x, (int, float))
    if is_number or not isinstance(high, (int, float)) or kernels_of(x).maximum is not None:
        return at_most(at_least(x, low), high)
    return namespace(x).clip(x, min=low, max=high)


def exp(x: Scalar) -> Scalar:
    """The exponential of a number or an array."""
    return math.exp(x) if isinstance(x, (int, float)) else namespace(x).exp(x)


def log(x: Scalar) -> Scalar:
    """The natural logarithm of a positive number or array."""
    return math.log(x) if isinstance(x, (int, float)) else namespace(x).log(x)


def where(condition: Array | bool, x: Scalar, y: Scalar) -> Scalar:
    """`x` where the condition holds, else `y`, of numbers and arrays."""
    if isinstance(condition, bool) or isinstance(x, (int, float)):
        return x if condition else y
    x, y = _alike(x, y)
    return namespace(x).where(condition, x, y)


def constant(value: float, like: Array) -> Array:
    """An array of `value`, of the dtype of `like` and of its shape, or of one that broadcasts."""
    made = kernels_of(like).constant
    return namespace(like).full_like(like, value) if made is None else made(value, like)


def _alike(x: Scalar, y: Scalar) -> tuple[Array, Array]:
    """Both as arrays of one dtype: the dtype of x unless x is a number."""
    if isinstance(x, (int, float)):
        return constant(x, y), y
    return x, constant(y, x) if isinstance(y, (int, float)) else cast(y, x)
