"""Tensors and trees of equal layers along a first axis, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from singd_core._tree import Tree

T = TypeVar("T", bound=Tree)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first axis; a single one as it is."""
    first, n = tensors[0], len(tensors)
    if n == 1:
        return first
    if first.ndim == 0:
        return torch.stack(tuple(tensors))
    return torch.cat(tuple(tensors)).view(n, *first.shape)  # `stack` calls two operations for each


def parts(joined: Tensor, n: int) -> Sequence[Tensor]:
    """The `n` tensors that were joined, as views."""
    return joined.unbind(0) if n > 1 else (joined,)


def join_trees(trees: Sequence[T]) -> T:
    """The trees as one, whose tensors are joined."""
    first, *others = trees
    return first.map(lambda *tensors: join(tensors), *others) if others else first


def tree_parts(joined: T, n: int) -> list[T]:
    """The `n` trees that were joined, of views."""
    if n == 1:
        return [joined]
    columns = zip(*(parts(tensor, n) for _, tensor in joined.named_arrays()), strict=True)
    return [joined.rebuild(column) for column in columns]
