"""Parameters, gradients and rows of any numbers: the pure optimizer knows no model."""

from typing import Any

import numpy as np

from singd_core import Convolution, Linear

LAYERS = {
    "map": Linear(),
    "head": Linear(),
    "grouped": Convolution((3,), padding=1, groups=2),
}
SHAPES = {
    "map": ((50, 40), (50,)),
    "head": (30, 50),
    "grouped": ((4, 2, 3), (4,)),
    "vector": (60,),
    "number": (),
}
ROWS = {
    "map": ((70, 40), (70, 50)),
    "head": ((70, 2, 50), (70, 2, 30)),
    "grouped": ((70, 4, 6), (70, 4, 6)),
}
CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.1},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:8", "blockdiagonal:8")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:3,5", "triubottomrightdiag")},
}


def each(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: each(function, value) for name, value in tree.items()}
    return tuple(map(function, tree)) if isinstance(tree, tuple) else function(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    each(found.append, tree)
    return found


def draw(rng: np.random.Generator, shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: draw(rng, shape) for name, shape in shapes.items()}
    if shapes and isinstance(shapes[0], tuple):
        return tuple(draw(rng, shape) for shape in shapes)
    return np.asarray(rng.standard_normal(shapes))


def problem(steps: int) -> tuple[Any, list[Any]]:
    """The parameters, and gradients and rows of each step, as large as a mean loss has them."""
    rng = np.random.default_rng(0)
    start, data = draw(rng, SHAPES), []
    for _ in range(steps):
        rows = {name: (x, g / len(g)) for name, (x, g) in draw(rng, ROWS).items()}
        data.append((draw(rng, SHAPES), rows))
    return start, data


def train(make: Any, case: str, start: Any, data: Any, to: Any = lambda x: x) -> tuple[Any, Any]:
    """The parameters and the state after the steps; `to` puts a NumPy array onto the device."""
    return go(make(LAYERS, **CASES[case]), each(to, start), [each_pair(to, d) for d in data])


def each_pair(to: Any, step: Any) -> tuple[Any, Any]:
    return each(to, step[0]), each(to, step[1])


def go(optimizer: Any, params: Any, data: Any) -> tuple[Any, Any]:
    """The steps, of arrays that are where they belong."""
    state = optimizer.init(params)
    for grads, rows in data:
        given = rows if optimizer.due(state) else None
        updates, state = optimizer.update(grads, state, params, given)
        params = optimizer.apply(params, updates)
    return params, state
