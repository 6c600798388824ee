"""Frobenius norms, with all threads of a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from singd_core._array import widen
from singd_torch.tensors import pieces

# torch takes norms with one thread, and dot products with all of them: of 2^22 numbers 280 µs, and
# 136 with two threads. Of fewer numbers than this, in bytes, a norm is as fast.
_LARGE = 1 << 18
# Where numbers do not begin at multiples of so many bytes, some dot products are slower.
_ALIGNED = 64


def norm(x: Tensor, axes: int) -> Tensor:
    """The Frobenius norm over the last `axes` axes, in at least float32."""
    batch = x.shape[: x.ndim - axes]
    if batch.numel() == 1 and _is_large(x):
        return _by_dot(x).reshape(batch)
    found: Tensor = torch.linalg.vector_norm(widen(x), dim=tuple(range(-axes, 0)))
    return found


def each_norm(tensors: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, ...]:
    """The norm of each of some tensors of one dtype, in at least float32."""
    large = {i: _by_dot(x) for i, x in enumerate(tensors) if _is_large(x)}
    rest = [x for i, x in enumerate(tensors) if i not in large]
    wide = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    others = iter(torch._foreach_norm(rest, 2, wide) if rest else ())
    return [large[i] if i in large else next(others) for i in range(len(tensors))]


def _is_large(x: Tensor) -> bool:
    """Whether one dot product is faster."""
    plain = type(x) in (Tensor, nn.Parameter) and not torch._C._are_functorch_transforms_active()
    return (
        plain
        and x.nbytes >= _LARGE
        and pieces.on_host(x)
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and x.storage_offset() * x.itemsize % _ALIGNED == 0
    )


def _by_dot(x: Tensor) -> Tensor:
    flat = x.view(-1)
    return torch.dot(flat, flat).sqrt_()
