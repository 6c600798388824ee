"""What the windows of a convolution see: padding, patches, and the average patch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from singd_core._array import Array, concat, device, namespace, take
from singd_core.layers._windows import Window

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pad(x: Array, windows: Sequence[Window], mode: str) -> Array:
    """`x`, shape (..., *spatial), padded along its spatial axes in one of torch's modes."""
    for axis, window in enumerate(windows, start=x.ndim - len(windows)):
        x = _pad_axis(x, axis, window.before, window.after, mode)
    return x


def patches(x: Array, windows: Sequence[Window], axis: int, one: bool = False) -> Array:
    """The patches of `x`, shape (..., *spatial), already padded.

    Returns:
        The shape of `x` with the number of output positions in place of each spatial size, and at
        `axis` a new axis of length K1 K2 ...: the entries of the patch. With `one`, a 1 after them.
    """
    # One copy of strided slices. With torch on two CPU cores, input (32, 64, 32, 32), 3x3 kernel:
    # 35 ms with the patch's axes first, 74 ms with them last; F.unfold takes 47 ms, and 118 ms with
    # the transposing copy that makes rows of it. The Gram product takes 120 ms for each.
    spatial = x.shape[x.ndim - len(windows) :]
    along = [w.unpadded().slices(n) for w, n in zip(windows, spatial, strict=True)]
    seen = [x[(..., *index)] for index in product(*along)]
    if one:
        seen.append(namespace(x).ones_like(seen[0]))
    return namespace(x).stack(seen, axis=axis)


def patches_at(x: Array, windows: Sequence[Window], at: Sequence[Array]) -> Array:
    """The patches of `x`, shape (groups, channels, batch, *spatial), padded, at some positions.

    `at` has for each axis the numbers of output positions: their products are the positions.

    Returns:
        Shape (groups, channels, K1 K2 ..., N).
    """
    xp, axes = namespace(x), len(windows)
    for i, (window, positions) in enumerate(zip(windows, at, strict=True)):
        k = window.dilation * xp.arange(window.size, device=device(x))
        seen = k[:, None] + window.stride * positions[None, :]
        axis = 3 + 2 * i  # each axis before has become two
        x = take(x, xp.reshape(seen, (prod(seen.shape),)), axis)
        x = xp.reshape(x, (*x.shape[:axis], *seen.shape, *x.shape[axis + 1 :]))
    entries, places = (range(3 + i, 3 + 2 * axes, 2) for i in range(2))
    x = xp.permute_dims(x, (0, 1, *entries, 2, *places))
    K = prod(x.shape[2 : 2 + axes])
    return xp.reshape(x, (*x.shape[:2], K, prod(x.shape[2 + axes :])))


def average_patch(x: Array, windows: Sequence[Window], mode: str) -> Array:
    """The mean over output positions of the patches of `x`, without forming them.

    One product with an averaging matrix a spatial axis (arXiv 2307.02275). The matrices hold the
    zero padding; the other modes pad the input.

    Args:
        x: Shape (batch, channels, *spatial), not padded.
        windows: One for each spatial axis.
        mode: The padding mode.

    Returns:
        Shape (batch, channels, K1, K2, ...).
    """
    if mode != "zeros":
        x = pad(x, windows, mode)
        windows = [window.unpadded() for window in windows]
    xp = namespace(x)
    for window in reversed(windows):  # the last axis, contracted, becomes the first kernel axis
        P = window.averaging_matrix(x.shape[-1], like=x)
        x = xp.moveaxis(x @ P.mT, -1, 2)
    return x


def _pad_axis(x: Array, axis: int, before: int, after: int, mode: str) -> Array:
    if before == after == 0:
        return x
    xp = namespace(x)
    n = x.shape[axis]

    def part(start: int, stop: int) -> Array:
        return x[(slice(None),) * axis + (slice(start, stop), ...)]

    def repeated(entry: Array, times: int) -> Array:
        return xp.broadcast_to(entry, (*x.shape[:axis], times, *x.shape[axis + 1 :]))

    unlimited = max(before, after) if n or mode == "zeros" else 0  # no edge to replicate
    most = {"reflect": n - 1, "circular": n}.get(mode, unlimited)
    if max(before, after) > most:
        raise ValueError(
            f"padding ({before}, {after}) with padding_mode = {mode!r}: at most {most} "
            f"is possible on a spatial axis of {n}"
        )
    if mode == "zeros":
        zero = xp.zeros_like(part(0, 1))
        left, right = repeated(zero, before), repeated(zero, after)
    elif mode == "replicate":
        left, right = repeated(part(0, 1), before), repeated(part(n - 1, n), after)
    elif mode == "circular":
        left, right = part(n - before, n), part(0, after)
    else:
        left = xp.flip(part(1, before + 1), axis=axis)
        right = xp.flip(part(n - 1 - after, n - 1), axis=axis)
    return concat((left, x, right), axis=axis)
