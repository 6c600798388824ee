"""Structures, states and all other trees of the core, as pytrees of jax."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax

from singd_core._tree import Tree


def register_trees() -> None:
    """Make every tree of the core a pytree of jax, those included that are defined later.

    Rebuilding skips `__init__`, since jax also rebuilds trees of things that are no arrays.
    """
    Tree.announce(_register)


# The classes that jax knows, with the names of what they hold, and those that flax knows as well.
_KNOWN: dict[type[Any], Callable[[], tuple[str, ...]]] = {}
_TO_FLAX: set[type[Any]] = set()


def static(cls: type[Any]) -> type[Any]:
    """Make a class, hashable and without arrays, a part of the structure of trees."""
    _KNOWN[cls] = tuple
    return jax.tree_util.register_static(cls)


def register_with_flax() -> None:
    """Let `flax.serialization`, where it is used, save every tree of the core."""
    serialization = sys.modules.get("flax.serialization")
    for cls, names in _KNOWN.items():
        if serialization is not None and cls not in _TO_FLAX:
            _TO_FLAX.add(cls)
            serialization.register_serialization_state(cls, *_saving(names, serialization))


def _saving(names: Callable[[], tuple[str, ...]], serialization: Any) -> tuple[Any, Any]:
    def saved(tree: Any) -> dict[str, Any]:
        return {n: serialization.to_state_dict(getattr(tree, n)) for n in names()}

    def restored(tree: Any, state: dict[str, Any]) -> Any:
        restore = serialization.from_state_dict
        missing = [n for n in names() if n not in state]
        if missing:
            raise ValueError(
                f"the saved {type(tree).__name__} has no {', '.join(missing)}: it is the state of "
                "another transformation, or of another version of singd_jax"
            )
        new = {n: restore(getattr(tree, n), state[n], name=n) for n in names()}
        return dataclasses.replace(tree, **new)

    return saved, restored


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
    _KNOWN[cls] = cls.field_names
