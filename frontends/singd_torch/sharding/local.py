"""Which layers are stepped in the parts in which they are, and which part of them is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from singd_core.step import couples_decay
from singd_core.structures import Diagonal
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer
from singd_torch.sharding.box import Box

# Factors of so many numbers cost a process nothing.
_SMALL = 4096
# The bytes of all others, in shares of the bytes of all state.
_MOST = 0.1


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows or columns of the matrix of a layer, and how many processes have the same."""

    is_rows: bool
    j: slice
    copies: int


ALL = Part(is_rows=True, j=slice(None), copies=1)


def local(
    layers: Sequence[Layer],
    places: Mapping[nn.Parameter, Sequence[Box]],
    sizes: Mapping[nn.Parameter, int],
    factors: Mapping[nn.Parameter, int],
) -> dict[nn.Parameter, list[Part]]:
    """The parts of layers that all processes step, each its own, by weight and process.

    Those are layers with a diagonal factor along the axis that is parted, as long as all processes
    can have their factors: small ones, and those whose bytes are a tenth of a process's share.
    `sizes` are the bytes of the state of each layer, of which `factors` are those of its factors.
    """
    found: dict[nn.Parameter, list[Part]] = {}
    processes = max((len(boxes) for boxes in places.values()), default=1)
    left = _MOST * sum(sizes.values()) / processes
    for layer in sorted(layers, key=lambda layer: factors[layer.weight]):
        parts = _parts(layer, places)
        if parts is None:
            continue
        _, d_out, d_in = layer.shape
        K, C = layer.structures
        if K.numbers(d_in) + C.numbers(d_out) > _SMALL:
            if factors[layer.weight] > left:
                continue
            left -= factors[layer.weight]
        found[layer.weight] = parts
    return found


def _parts(layer: Layer, places: Mapping[nn.Parameter, Sequence[Box]]) -> list[Part] | None:
    """The parts of a layer on each process, None if they cannot be stepped by themselves."""
    boxes, weight = places[layer.weight], layer.weight
    groups = [layer.group, *([] if layer.bias_group is None else [layer.bias_group])]
    settings = [settings_of(group) for group in groups]
    if not layer.has_rows or layer.without_rows or not settings[0].normalized:
        return None
    if any(map(couples_decay, settings)) or not all(box.numel for box in boxes):
        return None
    axes = {a for box in boxes for a, n in enumerate(box.shape) if n != weight.shape[a]}
    if len(axes) != 1 or sum(box.numel for box in set(boxes)) != weight.numel():
        return None
    (axis,) = axes
    is_rows = layer.kind.has_rows_along(axis)
    K, C = layer.structures
    if is_rows is None or not issubclass(C if is_rows else K, Diagonal):
        return None
    intervals = [(box.offset[axis], box.shape[axis]) for box in boxes]
    if layer.bias is not None:
        biases = [(*box.offset, *box.shape) for box in places[layer.bias]]
        if not is_rows or biases != intervals:
            return None
    counts = {box: list(boxes).count(box) for box in set(boxes)}
    return [
        Part(is_rows, slice(start, start + n), counts[box])
        for (start, n), box in zip(intervals, boxes, strict=True)
    ]
