"""How the state of a layer lies on the devices of a mesh that has parts of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from singd_core._array import Array
from singd_jax._layer import Layer


def shardings(
    layers: Mapping[str, Layer], arrays: Mapping[str, Array], states: Mapping[str, Any]
) -> dict[str, Any]:
    """The sharding of each array of the states of layers; None leaves an array to jax.

    The state is divided over the axes of the mesh that divide the weight, so a device has as large
    a share of both. The state of a weight that is whole on every device is whole, too.

    Args:
        layers: The layers.
        arrays: The parameters.
        states: The state of each layer: arrays, or their shapes.
    """
    found = {}
    for name, state in states.items():
        layer = layers[name]
        like, stack = _sharding(arrays[layer.weight.name]), len(layer.shape[0])
        found[name] = jax.tree.map(
            lambda a, like=like, stack=stack: None if like is None else _divided(a, like, stack),
            state,
        )
    return found


def _sharding(array: Array) -> Any:
    """The sharding of an array that lies on a mesh in parts, or None."""
    if isinstance(array, jax.core.Tracer):  # inside of jit XLA decides
        return None
    sharding = getattr(array, "sharding", None)
    divided = isinstance(sharding, jax.sharding.NamedSharding) and not sharding.is_fully_replicated
    return sharding if divided else None


def _divided(array: Any, like: Any, stack: int) -> Any:
    """The array divided by every axis of the mesh that can divide one of its own axes.

    The axes of a stack come last: a scan over equal layers takes one of them at a time. What has no
    other axes is a number for each layer, and stays whole.
    """
    left = list(array.shape)
    names: list[list[Any]] = [[] for _ in left]
    whole = len(left) <= stack or 0 in left
    used = {name for names in like.spec for name in _names(names)}
    for name, length in like.mesh.shape.items():
        if name not in used:
            continue
        for i in () if whole else (*range(stack, len(left)), *range(stack)):
            if length > 1 and left[i] % length == 0:
                names[i].append(name)
                left[i] //= length
                break
    partition: Any = jax.sharding.PartitionSpec
    spec = (tuple(own) if own else None for own in names)
    return jax.sharding.NamedSharding(like.mesh, partition(*spec))


def _names(names: Any) -> tuple[Any, ...]:
    """The axes of a mesh in one entry of a partition: none, one or several."""
    return names if isinstance(names, tuple) else () if names is None else (names,)
