"""What the CPU wants in another way than an accelerator: matrices in pieces, and plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# In numbers: an operation on so many is still 20 times as long as its call.
_PIECE = 1 << 18


def on_host(x: Tensor) -> bool:
    """Whether reading a tensor's value costs the host no wait, nor a compiler a break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def cut(x: Tensor) -> Sequence[Tensor]:
    """A matrix in pieces of its rows, views; one piece on an accelerator."""
    if x.ndim != 2 or x.numel() <= _PIECE or not on_host(x):
        return (x,)
    n = max(1, _PIECE // x.shape[1])
    return [x[i : i + n] for i in range(0, len(x), n)]


def number(x: Any) -> Any:
    """A 0-d tensor, or one of ones, as a number where the host need not wait.

    An operation on a 0-d tensor takes 5 µs; a scale of 1 is a pass over memory that is not taken.
    """
    if not isinstance(x, Tensor) or not on_host(x):
        return x
    if x.ndim == 0:
        return x.item()
    return 1.0 if bool((x == 1.0).all()) else x
