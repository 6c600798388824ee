"""Which process keeps the factors of which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from singd_torch._table import layer_bytes
from singd_torch.layers.layer import Layer


def balanced(
    layers: Iterable[Layer], processes: int, known: Mapping[nn.Parameter, int]
) -> dict[nn.Parameter, int]:
    """The owner of each layer, by its weight: the largest first, each to who has least.

    It follows from the shapes alone, so that all processes find the same. Those that are `known`
    stay where they are.
    """
    load = [0] * processes
    sizes = {layer.weight: layer_bytes(layer) for layer in layers}
    found = {weight: known[weight] for weight in sizes if weight in known}
    for weight, owner in found.items():
        load[owner] += sizes[weight]
    for weight in sorted(sizes, key=lambda weight: -sizes[weight]):
        if weight not in found:
            found[weight] = load.index(min(load))
            load[found[weight]] += sizes[weight]
    return found
