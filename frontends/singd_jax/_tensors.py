"""Leaves that show no rows, whose factors learn from their gradients alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp

from singd_core._array import Array
from singd_core._settings import Settings
from singd_core.rules import learns_from_gradients
from singd_jax._layer import Layer
from singd_jax._layers import Layers
from singd_jax._reasons import NUMBER

# Of whoever gives none: nothing is known of the parameters.
NONE = Layers({}, {}, {}, {}, None, "expand", "batch", searched=False)


def tensors(
    layers: Layers, arrays: Mapping[str, Array], owned: Collection[str], settings: Settings
) -> dict[str, Layer]:
    """The leaves that are matrices of real numbers and belong to no layer."""
    if not learns_from_gradients(settings):
        return {}
    shapes = {
        name: tuple(a.shape)
        for name, a in arrays.items()
        if name not in owned and jnp.issubdtype(a.dtype, jnp.floating)
    }
    return layers.tensors(shapes)


def extended(layers: Layers, found: Mapping[str, Layer], numbers: Sequence[str]) -> Layers:
    """The layers, what shows no rows, and Python numbers."""
    shapes = {part.name: part.shape for layer in found.values() for part in layer.parts}
    return dataclasses.replace(
        layers,
        found=layers.found | dict(found),
        others=layers.others | dict.fromkeys(numbers, NUMBER),
        shapes=layers.shapes | shapes,
    )
