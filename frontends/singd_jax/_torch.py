"""A run of `singd_torch` that goes on in JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from singd_core._array import Array
from singd_jax._layers import Layers
from singd_jax._part import Part

_MOMENTUM = "momentum_buffer"


def from_torch(
    saved: Mapping[str, Any], names: Sequence[str | Sequence[str]], layers: Layers
) -> dict[str, Any]:
    """The state of `singd_torch.SINGD` as named arrays, which `unflatten` takes.

    In both, a layer's matrix is `(d_out, d_in + 1)`, however its weight is stored. So the factors
    are the same. A momentum is stored as its parameter is. It is rearranged from a weight of torch,
    `(d_out, ...)` or a table `(entries, d_out)`, to a weight of JAX.

    Args:
        saved: What `optimizer.state_dict()` returned.
        names: For each parameter of the torch optimizer, in order, its name in JAX, or the name of
            its layer. If torch packs several layers or biases into one parameter, give their names:
            query, key and value of `torch.nn.MultiheadAttention`.
        layers: What `find_layers` returned.

    Raises:
        ValueError: If there are more parameters than names, a weight has not as many parts, or a
            momentum does not fit.
    """
    group = saved["param_groups"][0]
    flat: dict[str, Any] = {"step": group["steps"], "skipped": 0}
    flat["largest_lr"] = float(group.get("largest_lr", 0.0))
    if len(names) <= max(saved["state"], default=-1):
        raise ValueError(
            f"names has {len(names)} entries, and the saved state has "
            f"{1 + max(saved['state'])} parameters: give one for each"
        )
    for i, entries in saved["state"].items():
        name, arrays = names[i], {key: _array(value) for key, value in entries.items()}
        packed = [name] if isinstance(name, str) else list(name)
        momentum = arrays.pop(_MOMENTUM, None)
        try:
            if momentum is not None:
                flat |= _momenta(momentum, packed, layers)
            for key, a in arrays.items():
                pieces = [a] if isinstance(name, str) else _unpacked(key, a, len(packed))
                flat |= {f"{k}.{key}": piece for k, piece in zip(packed, pieces, strict=True)}
        except ValueError as error:
            raise ValueError(f"names[{i}] = {name!r}: {error}") from None
    return flat


def _momenta(momentum: Array, names: Sequence[str], layers: Layers) -> dict[str, Array]:
    """The momenta of the layers with such a name, or with a bias of such a name."""
    found: list[tuple[str, Part, bool]] = []
    for name in names:
        if name in layers:
            layer = layers[name]
            table = layer.kind.startswith("embedding")
            found.append((f"{name}.{_MOMENTUM}", layer.weight, table))
        for layer in layers.values():
            if layer.bias is not None and layer.bias.name == name:
                found.append((f"{layer.name}.bias_{_MOMENTUM}", layer.bias, False))
    if not found:
        raise ValueError("it has a momentum, and the layers no such weight or bias")
    *stack, d_out, d_in = found[0][1].matrix_shape
    first, rest = (d_in, d_out) if found[0][2] else (math.prod(stack) * d_out, d_in)
    shape = tuple(momentum.shape)
    if shape[0] != len(found) * first or math.prod(shape[1:]) != rest:
        raise ValueError(
            f"its momentum has shape {shape}, where {len(found)} of {first} × {rest} numbers fit"
        )
    pieces = momentum.reshape(len(found), first, rest)
    return {
        key: part.of_matrix(piece.T if table else piece)
        for (key, part, table), piece in zip(found, pieces, strict=True)
    }


def _unpacked(key: str, a: Array, n: int) -> Sequence[Array]:
    if a.ndim == 0 or len(a) != n:
        raise ValueError(f"{key} has shape {tuple(a.shape)}, which is not one of {n} packed layers")
    return list(a)


def _array(value: Any) -> Array:
    """A tensor of torch; NumPy, by which it comes, has no bfloat16."""
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        return _array(value.float()).astype(jnp.bfloat16)
    return jnp.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
