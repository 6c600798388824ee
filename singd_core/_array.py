"""The few array helpers that the Python Array API standard leaves open."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from array_api_compat import array_namespace, is_numpy_array

from singd_core._kernels import kernels_of

Array: TypeAlias = Any  # any array of a library that follows the Python Array API standard
Scalar: TypeAlias = Any  # a Python number, or an array of the batch axes' shape (often 0-d)

_NAMESPACES: dict[type, Any] = {}
# Types of arrays that are traced, and lie nowhere yet. To ask one of JAX costs a tenth of a second,
# for the message of an error.
TRACED: tuple[type, ...] = ()
_HALF: dict[tuple[type, Any], bool] = {}


def namespace(x: Array) -> Any:
    """The array-API namespace of `x`, looked up once for each array type.

    A dictionary look-up costs 0.07 µs, `array_namespace` 1.2 µs: more than a small matrix product.

    Raises:
        TypeError: If `x` is of NumPy and multiplies otherwise: a matrix, or a masked array.
    """
    kind = type(x)
    xp = _NAMESPACES.get(kind)
    if xp is None:
        xp = array_namespace(x)
        of_numpy = is_numpy_array(x) and issubclass(kind, xp.ndarray)
        if of_numpy and kind.__mul__ is not xp.ndarray.__mul__:
            name = f"{kind.__module__}.{kind.__name__}"
            raise TypeError(f"a {name} has an arithmetic of its own: give plain arrays of numpy")
        _NAMESPACES[kind] = xp
    return xp


def device(x: Array) -> Any:
    """The device of `x`; None, which means the default one, for a traced JAX array.

    `array_api_compat.device` does the same, and makes torch.compile warn.
    """
    return None if is_traced(x) else getattr(x, "device", None)


def is_traced(x: Array) -> bool:
    """Whether `x` stands for an array of a program that a compiler makes kernels of."""
    return isinstance(x, TRACED)


def is_half(x: Array) -> bool:
    """Whether `x` is stored in 16 bits (float16 or bfloat16)."""
    key = type(x), x.dtype
    half = _HALF.get(key)
    if half is None:
        # NumPy's finfo, which is CuPy's too, does not know the bfloat16 of ml_dtypes
        xp, half = namespace(x), _is_bfloat16(x)
        half = half or (xp.isdtype(x.dtype, "real floating") and xp.finfo(x.dtype).bits == 16)
        _HALF[key] = half
    return half


def is_inexact(x: Array) -> bool:
    """Whether `x` holds floating-point numbers, real or complex."""
    return is_half(x) or namespace(x).isdtype(x.dtype, ("real floating", "complex floating"))


def is_complex(x: Array) -> bool:
    """Whether `x` holds complex numbers."""
    return not _is_bfloat16(x) and bool(namespace(x).isdtype(x.dtype, "complex floating"))


def _is_bfloat16(x: Array) -> bool:
    return str(x.dtype).endswith("bfloat16")


def widen(x: Array) -> Array:
    """`x`, in float32 if it is stored in 16 bits: for sums, norms, fft and linalg."""
    return namespace(x).astype(x, namespace(x).float32) if is_half(x) else x


def ranged(x: Array) -> Array:
    """`x`, in float32 if it is float16: for what leaves the range of that, e.g. sums of squares."""
    return widen(x) if is_half(x) and not _is_bfloat16(x) else x


def cast(x: Array, like: Array) -> Array:
    """`x` in the dtype of `like` (`x` itself if it has it already)."""
    return x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype)


def expand(c: Scalar, like: Array) -> Scalar:
    """The scalar `c`, ready to multiply `like`, whose first axes are the axes of `c`.

    A Python number is returned as it is: it takes the array's dtype. An array is cast to it, since
    0-d arrays promote in some libraries and not in others, and gets the trailing axes it lacks.
    """
    if isinstance(c, (int, float)):
        return float(c)  # NumPy's float64 scalars, which are floats too, would promote
    c = cast(c, like)
    missing = like.ndim - c.ndim
    return (
        c if c.ndim == 0 or missing == 0 else namespace(c).reshape(c, (*c.shape, *(1,) * missing))
    )


def eye(d: int, *, like: Array, batch: Sequence[int] = ()) -> Array:
    """The identity, shape (*batch, d, d), with the dtype and device of `like`."""
    xp = namespace(like)
    identity = xp.eye(d, dtype=like.dtype, device=device(like))
    return xp.broadcast_to(identity, (*batch, d, d)) if batch else identity


def full(shape: Sequence[int], value: float, *, like: Array) -> Array:
    """An array of `value` everywhere, with the dtype and device of `like`."""
    return namespace(like).full(tuple(shape), value, dtype=like.dtype, device=device(like))


def wide_full(shape: Sequence[int], value: float, *, like: Array) -> Array:
    """`full` in at least float32."""
    dtype = widen(like[..., :0]).dtype
    return namespace(like).full(tuple(shape), value, dtype=dtype, device=device(like))


def empty(shape: Sequence[int], *, like: Array) -> Array | None:
    """An array to be written to, or None where a frontend has not said that arrays can be."""
    make = kernels_of(like).empty
    return None if make is None else make(shape, like)


def is_view(part: Array, whole: Array) -> bool:
    """Whether what is written to a part is written to the whole, as far as is known."""
    known = kernels_of(whole).is_view
    return known is not None and known(part, whole)


def norm(x: Array, axes: int = 2) -> Array:
    """The Frobenius norm over the last `axes` axes, in at least float32."""
    own = kernels_of(x).norm
    if own is not None:
        return own(x, axes)
    return namespace(x).linalg.vector_norm(widen(x), axis=tuple(range(-axes, 0)))


def sum_of_squares(x: Array, axes: int) -> Array:
    """The sum of squares over the last `axes` axes, accumulated in at least float32."""
    if is_traced(x):  # no root: XLA runs the sum as it is, and compiles a kernel for the root
        x = widen(x)
        return namespace(x).sum(x * x, axis=tuple(range(-axes, 0)))
    root = norm(x, axes)
    return root * root


def cumulative_sum(x: Array) -> Array:
    """The sums of the first entries along the last axis, one, two, ..., all of them."""
    own = kernels_of(x).cumulative_sum
    if own is not None:
        return own(x)
    xp = namespace(x)
    # The name that libraries had before the standard: torch.compile warns of what wraps the other.
    before = getattr(xp, "cumsum", None)
    return xp.cumulative_sum(x, axis=-1) if before is None else before(x, -1)


def sums_of_squares(X: Array) -> Array:
    """Sums of squares over the rows of `X`, shape (..., n, d), as (..., d), in at least float32.

    Not as norms along that axis: torch takes ten times as long for them, 1.2 ms and 0.12 ms for
    1024 × 512 numbers on a CPU.
    """
    X = widen(X)
    fused = kernels_of(X).sums_of_squares
    return namespace(X).sum(X * X, axis=-2) if fused is None else fused(X)


def multiply_add(x: Array, c: Scalar, y: Array, out: Array | None = None) -> Array:
    """`x c + y`, in one pass over memory where a frontend has said how; `out` may be overwritten.

    x is an array, c and y are numbers or arrays. One of them has the shape of the result, and the
    others broadcast.
    """
    fused = kernels_of(x).multiply_add
    return _multiply_add(x, c, y) if fused is None else fused(x, c, y, out)


def add_product(Y: Array, A: Array, B: Array) -> Array:
    """`Y + A B` of shapes (..., m, n), (..., m, k) and (..., k, n); `Y` may be overwritten."""
    fused = kernels_of(Y).add_product
    return Y + A @ B if fused is None else fused(Y, A, B)


def add_diagonal(A: Array, c: Scalar) -> Array:
    """`A + c I` for A of shape (..., d, d) and c a number or of the shape of its first axes.

    `A` may be overwritten.
    """
    fused = kernels_of(A).add_diagonal
    return A + expand(c, A) * eye(A.shape[-1], like=A) if fused is None else fused(A, c)


def product(A: Array, B: Array, out: Array) -> Array:
    """`A B`, written to `out` where a frontend has said how."""
    into = kernels_of(A).product
    return A @ B if into is None else into(A, B, out)


def times(A: Array, B: Array, out: Array) -> Array:
    """`A * B`, written to `out` where a frontend has said how."""
    into = kernels_of(A).times
    return A * B if into is None else into(A, B, out)


def take(x: Array, indices: Array, axis: int) -> Array:
    """The entries of `x` at `indices`, of one axis, along an axis that is not negative."""
    fused = kernels_of(x).take
    return namespace(x).take(x, indices, axis=axis) if fused is None else fused(x, indices, axis)


def inverse(A: Array) -> Array:
    """The inverse of `A`, shape (..., d, d); not finite if there is none."""
    fused = kernels_of(A).inverse
    if fused is not None:
        return fused(A)
    try:
        return namespace(A).linalg.inv(A)
    except Exception as error:  # of a class of each library's own
        if "LinAlgError" not in type(error).__name__:
            raise
        return full(A.shape, math.nan, like=A)


def total(x: Array) -> Array:
    """The sum of all entries, a 0-d array."""
    return namespace(x).sum(x, axis=None)


def concat(parts: Sequence[Array], axis: int) -> Array:
    """The non-empty parts joined along `axis`; a single one is returned without a copy."""
    parts = [part for part in parts if part.shape[axis]] or list(parts[:1])
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concat(parts, axis=axis)


def append_ones(x: Array, axis: int, value: float = 1.0) -> Array:
    """`x` with one more entry along `axis`, filled with ones (or another value)."""
    if x.shape[axis] == 0:
        return full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), value, like=x)
    index = (slice(None),) * axis + (slice(0, 1), ...)
    return concat((x, namespace(x).full_like(x[index], value)), axis=axis)


def chain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works entry by entry, run as one kernel where a frontend has said how.

    Its body may use operators and `cast`, but no operator between two numbers. It returns arrays
    of the shape of its first argument.
    """

    @functools.wraps(function)
    def run(x: Array, *others: Any) -> Any:
        fuse = kernels_of(x).fuse
        return (function if fuse is None else fuse(function))(x, *others)

    return run


@chain
def _multiply_add(x: Array, c: Scalar, y: Array) -> Array:
    return x * c + y
