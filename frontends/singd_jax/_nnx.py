"""Models of flax.nnx: what of them is trained, and what they change while they run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax


def is_model(tree: Any) -> bool:
    """Whether it is a module of flax.nnx, whose variables a loss may change."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(tree, nnx.Module)


def variables(model: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[Any, int]]:
    """For each leaf of a model the variable that holds it, and as which of its leaves."""
    nnx: Any = sys.modules["flax.nnx"]
    found: list[tuple[Any, int]] = []
    for value in jax.tree.leaves(
        model, is_leaf=lambda v: isinstance(v, nnx.Variable) or is_leaf(v)
    ):
        found += [(value, i) for i, _ in enumerate(jax.tree.leaves(value, is_leaf=is_leaf))]
    return found


def trained(model: Any, is_leaf: Callable[[Any], bool]) -> list[bool]:
    """For each leaf of a model, whether an `nnx.Param` holds it."""
    nnx: Any = sys.modules["flax.nnx"]
    return [isinstance(variable, nnx.Param) for variable, _ in variables(model, is_leaf)]


def update(model: Any, new: Any) -> None:
    """Give the variables of a model the values that another model's have."""
    nnx: Any = sys.modules["flax.nnx"]
    nnx.update(model, nnx.state(new))


def pure(tree: Any) -> Any:
    """A tree with arrays in the place of variables, such as the state of an `nnx.Optimizer`."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(tree)
    # flax 0.12.0 has no such function
    return jax.tree.map(
        lambda v: v.value if isinstance(v, nnx.Variable) else v,
        tree,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
