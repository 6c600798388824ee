"""What the CPU wants in another way than an accelerator: matrices in pieces, and plain numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from singd_core.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Structure,
    TrilToeplitz,
    TriuToeplitz,
)

T = TypeVar("T")

# In numbers: an operation on so many is still 20 times as long as its call.
_PIECE = 1 << 18
# In rows, so that pieces begin at multiples of 64 bytes. Where they do not, a dot product can take
# five times as long: 140,515 numbers 157 µs, and 31 µs.
_ALIGNED = 32


def on_host(x: Tensor) -> bool:
    """Whether reading a tensor's value costs the host no wait, nor a compiler a break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def transforms(*structures: type[Structure]) -> bool:
    """Whether a product with one of these is a Fourier transform."""
    return any(issubclass(structure, (TrilToeplitz, TriuToeplitz)) for structure in structures)


def piece_size(*structures: type[Structure]) -> int:
    """How many numbers a piece has of what is multiplied with matrices of these structures.

    Products have temporaries, and Fourier transforms have several, in memory that is new to the
    process if they are large. A step of a 512 × 785 weight takes 54 ms with Toeplitz matrices, in
    place of 80; with hierarchical ones 16, in place of 18. Products with blocks are written into
    memory that is lent, and want few calls: 5.7 ms with blocks of 56 and 64, in place of 6.3.
    """
    if transforms(*structures):
        return _PIECE // 4
    if all(issubclass(s, Diagonal) for s in structures):
        return _PIECE
    in_blocks = all(issubclass(s, (BlockDiagonal, Dense, Diagonal)) for s in structures)
    return 4 * _PIECE if in_blocks else _PIECE // 2


def narrowed(L: Structure) -> Structure:
    """The matrix in bfloat16, unless products with it are none of matrices."""
    if isinstance(L, Diagonal) or transforms(type(L)):
        return L
    return L.astype(torch.empty(0, dtype=torch.bfloat16, device=L.like.device))


def cut(x: Tensor, most: int | None = None) -> Sequence[Tensor]:
    """A matrix in pieces of its rows, views of at most so many numbers; one on an accelerator."""
    places = rows_of_pieces(x, most or _PIECE, 1)
    return [x[j] for j in places] if len(places) > 1 else (x,)


def rows_of_pieces(x: Tensor, most: int, block: int) -> Sequence[slice]:
    """The rows of such pieces, all but the last of whole blocks of so many rows."""
    if x.ndim != 2 or x.numel() <= most or not on_host(x):
        return (slice(None),)
    n, step = most // x.shape[1], math.lcm(block, _ALIGNED)
    n = n // step * step or max(n // block, 1) * block
    return [slice(i, min(i + n, len(x))) for i in range(0, len(x), n)]


def read(x: Tensor) -> Any:
    """A 0-d tensor as a number where the host need not wait for it."""
    return x.item() if x.ndim == 0 and on_host(x) else x


def read_all(x: Tensor) -> list[float] | None:
    """A 1-d tensor as numbers where the host need not wait for them, else None."""
    return x.tolist() if x.ndim == 1 and on_host(x) else None


def placed(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on a device, filled in there: a copy of it, as `as_tensor` makes, is a wait."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def brought(owner: T, device: torch.device) -> T:
    """A dataclass with the tensors that are its own fields on a device."""
    fields: dict[str, Any] = vars(owner)
    there: Any = {name: x.to(device) for name, x in fields.items() if isinstance(x, Tensor)}
    return dataclasses.replace(owner, **there)  # type: ignore[type-var]
