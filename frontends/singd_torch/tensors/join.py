"""Tensors and trees of equal layers along a first axis, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from singd_core._tree import Tree

T = TypeVar("T", bound=Tree)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first axis; a single one, or the parts of one, without a copy."""
    first, n = tensors[0], len(tensors)
    if n == 1:
        return first
    if _are_adjacent(tensors):
        return first.as_strided((n, *first.shape), (first.numel(), *first.stride()))
    if first.ndim == 0:
        return torch.stack(tuple(tensors))
    return torch.cat(tuple(tensors)).view(n, *first.shape)  # `stack` calls two operations for each


def _are_adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors follow each other in memory, as what `parts` returns."""
    first, n = tensors[0], tensors[0].numel()
    if type(first) is not Tensor or n == 0:
        return False
    memory, start = first.untyped_storage()._cdata, first.storage_offset()
    return all(
        t.untyped_storage()._cdata == memory
        and t.storage_offset() == start + i * n
        and t.is_contiguous()
        for i, t in enumerate(tensors)
    )


def parts(joined: Tensor, n: int) -> Sequence[Tensor]:
    """The `n` tensors that were joined, as views."""
    return joined.unbind(0) if n > 1 else (joined,)


def join_trees(trees: Sequence[T]) -> T:
    """The trees as one, whose tensors are joined."""
    first, *others = trees
    return first.map(lambda *tensors: join(tensors), *others) if others else first


def in_a_row(trees: Sequence[T]) -> T:
    """The arrays of several trees, flat and one behind the other."""
    first, *others = trees
    return first.map(lambda *ts: torch.cat([t.reshape(-1) for t in ts]), *others)


def are_equal(one: Tree, other: Tree) -> bool:
    """Whether all arrays of two alike trees have the same numbers."""
    pairs = zip(one.named_arrays(), other.named_arrays(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def tree_parts(joined: T, n: int) -> list[T]:
    """The `n` trees that were joined, of views."""
    if n == 1:
        return [joined]
    columns = zip(*(parts(tensor, n) for _, tensor in joined.named_arrays()), strict=True)
    return [joined.rebuild(column) for column in columns]


def owned(taken: set[int], tensor: Tensor) -> Tensor:
    """The tensor, in memory of its own where it was a part of more, or where that is taken.

    It would keep the rest alive, and it will be written to.
    """
    memory = tensor.untyped_storage()
    whole = memory.nbytes() // max(1, tensor.element_size())
    if whole != tensor.numel() or (whole and memory.data_ptr() in taken):
        tensor = tensor.clone()
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor
