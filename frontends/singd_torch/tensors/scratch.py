"""Memory that is written anew for each layer: on a CPU, new memory costs as much as a pass over it.

A step needs two arrays of the size of the largest matrix, for all layers. An optimizer keeps them
if the allocator would not: the others it gives out again, warm, and activations may have them too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from singd_torch.tensors import pieces

# In numbers: less is given out again by the allocator, warm.
_LEAST = 1 << 14

# In bytes: malloc gives more back to the system at once, and maps it anew.
_MAPPED = 1 << 25

AVERAGE, PRODUCT = 0, 1

_CONSTANTS = 64  # so many are kept at most


class Scratch:
    """The memory of one optimizer."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor, slot: int) -> Tensor:
        """A tensor of any content. It is overwritten by the next one of this slot."""
        n, key = math.prod(shape), (slot, like.dtype)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < n:
            kept = self._kept[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return kept[:n].view(tuple(shape))

    def give_back(self) -> None:
        """Keep the arrays alone that the allocator would not keep."""
        self._kept = {key: kept for key, kept in self._kept.items() if kept.nbytes > _MAPPED}

    def constant(self, value: float, like: Tensor) -> Tensor:
        """A number as a 0-d tensor, which is not to be written to."""
        key = value, like.dtype, like.device
        if key not in self._constants:
            if len(self._constants) == _CONSTANTS:  # of settings that change
                self._constants.clear()
            self._constants[key] = _full(value, like)
        return self._constants[key]


_CURRENT: ContextVar[Scratch | None] = ContextVar("scratch", default=None)


@contextlib.contextmanager
def lent(scratch: Scratch) -> Iterator[None]:
    """Let `empty` take from this memory, and give back what need not be kept."""
    token = _CURRENT.set(scratch)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        scratch.give_back()


def empty(shape: Sequence[int], like: Tensor, slot: int = AVERAGE) -> Tensor:
    """A tensor of any content, in memory that is lent if it is large and on the host."""
    scratch = _CURRENT.get()
    if scratch is None or math.prod(shape) < _LEAST or not pieces.on_host(like):
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return scratch.take(shape, like, slot)


def constant(value: float, like: Tensor) -> Tensor:
    """A number as a 0-d tensor, which is made once where memory is lent."""
    scratch = None if torch.compiler.is_compiling() else _CURRENT.get()
    return _full(value, like) if scratch is None else scratch.constant(value, like)


def _full(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)
