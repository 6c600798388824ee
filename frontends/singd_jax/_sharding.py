"""How the state of a layer lies on the devices of a mesh that has parts of its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_jax import _compat
from singd_jax._layer import Layer

T = TypeVar("T")


def placed(
    layers: Mapping[str, Layer], arrays: Mapping[str, Array], states: Mapping[str, Any]
) -> dict[str, Any]:
    """The states of layers as they lie on devices: for each array its shape and sharding.

    The state is divided over the axes of the mesh that divide the weight, so a device has as large
    a share of both; zeros make some axes longer, for the mesh to divide them. The state of a weight
    that is whole on every device is whole, too. Where a weight is on no mesh, it is left to jax.

    Args:
        layers: The layers.
        arrays: The parameters.
        states: The shapes of the state of each layer.
    """
    found = {}
    for name, state in states.items():
        layer = layers[name]
        like, stack = _sharding(arrays[layer.weight.name]), len(layer.shape[0])
        found[name] = jax.tree.map(partial(_placed, like=like, stack=stack), state)
    return found


def _placed(array: Any, like: Any, stack: int) -> Any:
    if like is not None:
        return _divided(array, like, stack)
    # without what its type says where devices have parts, as in shard_map: jit wants none of it
    return jax.ShapeDtypeStruct(array.shape, array.dtype)  # type: ignore[no-untyped-call]


def numbers_everywhere(tree: T, arrays: Mapping[str, Array]) -> T:
    """The tree with its numbers on every device of the mesh that the parameters lie on.

    A number on one device would move in the first step, and the second be compiled again.
    """
    meshes = {own.mesh for own in map(_sharding, arrays.values()) if own is not None}
    if len(meshes) != 1:
        return tree
    partition: Any = jax.sharding.PartitionSpec
    here = jax.sharding.NamedSharding(meshes.pop(), partition())
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, a in enumerate(leaves) if jnp.ndim(a) == 0]
    moved = jax.jit(lambda numbers: numbers, out_shardings=here)([leaves[i] for i in where])
    for i, number in zip(where, moved, strict=True):
        leaves[i] = number
    return structure.unflatten(leaves)  # type: ignore[no-any-return]


def lengthened(tree: T, like: T) -> T:
    """The arrays with zeros at the end of each axis, to the shapes of others, sharded as these."""

    def one(a: Array, b: Array) -> Array:
        if a.shape == b.shape:
            return a
        more = [(0, n - m) for m, n in zip(a.shape, b.shape, strict=True)]
        longer, sharding = jnp.pad(a, more), _sharding(b)
        return longer if sharding is None else jax.device_put(longer, sharding)

    return jax.tree.map(one, tree, like)  # type: ignore[no-any-return]


def shortened(tree: T, shapes: Sequence[tuple[int, ...]]) -> T:
    """The first entries along each of the last axes: the inverse of `lengthened`."""

    def one(a: Array, shape: tuple[int, ...]) -> Array:
        if a.shape[a.ndim - len(shape) :] == shape:
            return a
        return _compat.whole(a)[(..., *map(slice, shape))]

    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(one, leaves, shapes))  # type: ignore[no-any-return]


def _sharding(array: Array) -> Any:
    """The sharding of an array that lies on a mesh, or None."""
    if isinstance(array, jax.core.Tracer):  # inside of jit XLA decides
        return None
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _longer(shape: Sequence[int], stack: int) -> tuple[int, ...]:
    """The shape with the axes of matrices up to multiples of powers of two, an eighth at most.

    The bias makes a side d_in + 1, which no mesh divides. The power depends on the length alone, so
    that a state fits meshes of other lengths as well. A vector stays as it is: one that is divided
    otherwise than its weight costs a transfer of the weight.
    """
    if len(shape) < stack + 2:
        return tuple(shape)

    def up(n: int) -> int:
        power = min(128, 1 << (n // 8).bit_length() - 1) if n >= 8 else 1
        return -(-n // power) * power

    return (*shape[:stack], *map(up, shape[stack:]))


def _divided(array: Any, like: Any, stack: int) -> Any:
    """The array divided by every axis of the mesh that can divide one of its own axes.

    The axes of a stack come last: a scan over equal layers takes one of them at a time. What has no
    other axes is a number for each layer, and stays whole.
    """
    used = {name for names in like.spec for name in _names(names)}
    whole = array.ndim <= stack or array.size == 0 or not used
    shape = array.shape if whole else _longer(array.shape, stack)
    left = list(shape)
    names: list[list[Any]] = [[] for _ in left]
    for name, length in like.mesh.shape.items():
        if name not in used:
            continue
        for i in () if whole else (*range(stack, len(left)), *range(stack)):
            if length > 1 and left[i] % length == 0:
                names[i].append(name)
                left[i] //= length
                break
    while names and not names[-1]:  # as jax writes what it has computed
        names.pop()
    partition: Any = jax.sharding.PartitionSpec
    spec = partition(*(tuple(own) or None for own in names))
    sharding = jax.sharding.NamedSharding(like.mesh, spec)
    struct: Any = jax.ShapeDtypeStruct
    return struct(shape, array.dtype, sharding=sharding)


def _names(names: Any) -> tuple[Any, ...]:
    """The axes of a mesh in one entry of a partition: none, one or several."""
    return names if isinstance(names, tuple) else () if names is None else (names,)
