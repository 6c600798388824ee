"""Structures, and all other trees of the core, as pytrees of torch (`torch.utils._pytree`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

from singd_core._tree import Tree


def register_trees() -> None:
    """Make every tree of the core a pytree of torch, those included that are defined later.

    A field that is None is part of the tree's structure, as in jax, and no leaf. Rebuilding skips
    `__init__`, since torch also rebuilds trees of things that are no arrays.
    """
    Tree.announce(_register)


def _register(cls: type[Tree]) -> None:
    def flatten(tree: Tree) -> tuple[list[Any], tuple[str, ...]]:
        # Numbers are leaves: torch itself rebuilds a tree of zeros, and takes it apart again.
        values = {n: getattr(tree, n) for n in cls.field_names()}
        names = tuple(n for n, value in values.items() if value is not None)
        return [values[n] for n in names], names

    def flatten_with_keys(tree: Tree) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[str, ...]]:
        children, names = flatten(tree)
        return [(pytree.GetAttrKey(n), c) for n, c in zip(names, children, strict=True)], names

    def unflatten(children: Iterable[Any], names: tuple[str, ...]) -> Tree:
        new = object.__new__(cls)
        for n in cls.field_names():
            object.__setattr__(new, n, None)
        for n, child in zip(names, children, strict=True):
            object.__setattr__(new, n, child)
        return new

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
