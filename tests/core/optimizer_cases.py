"""A small problem for the pure optimizer: parameters, gradients and rows of any numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from singd_core import Convolution, Linear

LAYERS = {
    "map": Linear(),
    "head": Linear(),
    "grouped": Convolution((3,), padding=1, groups=2),
}
SHAPES = {
    "map": ((5, 4), (5,)),
    "head": (3, 5),
    "grouped": ((4, 2, 3), (4,)),
    "experts": (2, 3, 4),  # shows no rows
    "vector": (6,),
    "number": (),
}
ROWS = {
    "map": ((7, 4), (7, 5)),
    "head": ((7, 2, 5), (7, 2, 3)),
    "grouped": ((7, 4, 6), (7, 4, 6)),
}


def draw(rng: np.random.Generator, shapes: dict[str, Any]) -> dict[str, Any]:
    def one(shape: Any) -> Any:
        if shape and isinstance(shape[0], tuple):
            return tuple(rng.standard_normal(part) for part in shape)
        return rng.standard_normal(shape)

    return {name: one(shape) for name, shape in shapes.items()}


def params() -> dict[str, Any]:
    return draw(np.random.default_rng(0), SHAPES)


def steps(n: int, seed: int = 1) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Gradients and rows of n steps: any numbers, since the optimizer knows no model."""
    rng = np.random.default_rng(seed)
    return [(draw(rng, SHAPES), draw(rng, ROWS)) for _ in range(n)]


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A parameter, a tuple or a dictionary of them, with each array replaced."""
    if isinstance(tree, dict):
        return {name: mapped(function, value) for name, value in tree.items()}
    return tuple(map(function, tree)) if isinstance(tree, tuple) else function(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, tree)
    return found


def train(
    optimizer: Any,
    data: list[Any],
    start: Any,
    to: Callable[[Any], Any] = lambda x: x,
    update: Any = None,
) -> tuple[Any, Any]:
    """Parameters and state after the steps; `to` makes an array of the library."""
    p = mapped(to, start)
    state, update = optimizer.init(p), update or optimizer.update
    for g, rows in data:
        due = optimizer.due(state)
        updates, state = update(mapped(to, g), state, p, mapped(to, rows) if due else None)
        p = optimizer.apply(p, updates)
    return p, state


GIVEN: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "damping": 0.1},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:1,1", "hierarchical:1,1")},
}
