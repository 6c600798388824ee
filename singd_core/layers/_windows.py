"""The window that a convolution slides along each spatial axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from singd_core._array import Array, device, namespace
from singd_core.layers.base import whole

Size: TypeAlias = "int | Sequence[int]"
Padding: TypeAlias = "int | str | Sequence[int | tuple[int, int]]"


class Window(NamedTuple):
    """A window of `size` entries `dilation` apart, moved by `stride` over a padded axis."""

    size: int
    stride: int
    dilation: int
    before: int
    after: int

    def unpadded(self) -> Window:
        """The same window, on an axis that has been padded already."""
        return self._replace(before=0, after=0)

    def positions(self, length: int) -> int:
        """How often the window fits on an axis of `length`, padding included."""
        reach = self.dilation * (self.size - 1) + 1
        padded = length + self.before + self.after
        if padded < reach:
            raise ValueError(
                f"a kernel that reaches over {reach} entries does not fit on a spatial axis of "
                f"{padded} (padding included): check kernel_size, dilation and padding, and that "
                "the input is (batch, channels, *spatial)"
            )
        return (padded - reach) // self.stride + 1

    def slices(self, length: int) -> list[slice]:
        """For each entry of the window, the slice of the *padded* axis that it passes over."""
        last = (self.positions(length) - 1) * self.stride
        starts = (k * self.dilation for k in range(self.size))
        return [slice(start, start + last + 1, self.stride) for start in starts]

    def averaging_matrix(self, length: int, like: Array) -> Array:
        """`(size, length)`: row k averages what entry k of the window sees, zero-padded.

        The index pattern of arXiv 2307.02275 averaged over the output positions `o`: entry (k, i)
        is 1/positions where `i + before = k dilation + o stride` for one of them, else 0.
        """
        xp, where = namespace(like), device(like)
        positions = self.positions(length)
        k = xp.arange(self.size, device=where)[:, None]
        i = xp.arange(length, device=where)[None, :]
        moved = i + self.before - k * self.dilation
        seen = (moved >= 0) & (moved < positions * self.stride) & (moved % self.stride == 0)
        return xp.astype(seen, like.dtype) / positions


def windows(kernel_size: Size, stride: Size, padding: Padding, dilation: Size) -> list[Window]:
    """One window a spatial axis, from the arguments of a convolution as torch knows them."""
    n = len(kernel_size) if hasattr(kernel_size, "__len__") else 0
    if n == 0:
        raise ValueError(
            f"kernel_size = {kernel_size!r}: give a tuple with one entry for each spatial axis, "
            "such as (3, 3) for a 2d convolution"
        )
    sizes = _per_axis("kernel_size", kernel_size, n)
    strides = _per_axis("stride", stride, n)
    dilations = _per_axis("dilation", dilation, n)
    if isinstance(padding, str):
        named = zip(sizes, strides, dilations, strict=True)
        pads = [_named_padding(padding, *axis) for axis in named]
    else:
        pads = [_padding(p) for p in _repeated("padding", padding, n)]
    axes = zip(sizes, strides, dilations, pads, strict=True)
    return [Window(k, s, d, before, after) for k, s, d, (before, after) in axes]


def check_kernel(kind: object, windows: Sequence[Window], weight_shape: Sequence[int]) -> None:
    """Refuse a weight whose last axes are no kernel of these windows.

    Raises:
        ValueError: Naming the kind of layer.
    """
    sizes = tuple(window.size for window in windows)
    if tuple(weight_shape[2:]) != sizes:
        raise ValueError(
            f"{kind} has a kernel of shape {sizes}, and a weight of shape {tuple(weight_shape)} "
            "another: check kernel_size"
        )


def _named_padding(padding: str, size: int, stride: int, dilation: int) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f"padding = {padding!r}: choose 'same', 'valid', or numbers")
    if stride != 1:
        raise ValueError("padding = 'same' needs stride = 1: give the padding as numbers")
    total = dilation * (size - 1)
    return total // 2, total - total // 2


def _padding(entry: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(entry) if hasattr(entry, "__iter__") else (entry, entry)
    if len(pair) != 2:
        raise ValueError(f"padding entry {entry!r}: give a number or a pair (before, after)")
    before, after = (whole(f"padding entry {entry!r}:", n, 0) for n in pair)
    return before, after


def _per_axis(name: str, value: Size, n: int) -> list[int]:
    entries = _repeated(name, value, n)
    return [whole(f"{name} = {value!r}: every entry", entry, 1) for entry in entries]


def _repeated(name: str, value: Any, n: int) -> list[Any]:
    entries = list(value) if hasattr(value, "__iter__") else [value] * n
    if len(entries) != n:
        raise ValueError(f"{name} = {value!r}: give one number, or {n} as in kernel_size")
    return entries
