"""Structures, states and all other trees of the core, as pytrees of jax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from singd_core._tree import Tree


def register_trees() -> None:
    """Make every tree of the core a pytree of jax, those included that are defined later.

    Rebuilding skips `__init__`, since jax also rebuilds trees of things that are no arrays.
    """
    Tree.announce(_register)


def _register(cls: type[Tree]) -> None:
    def flatten(tree: Tree) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(tree, n) for n in cls.field_names()), None

    def flatten_with_keys(tree: Tree) -> tuple[tuple[tuple[Any, Any], ...], None]:
        names = cls.field_names()
        return tuple((jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in names), None

    def unflatten(_: None, children: Iterable[Any]) -> Tree:
        new = object.__new__(cls)
        for n, child in zip(cls.field_names(), children, strict=True):
            object.__setattr__(new, n, child)
        return new

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
