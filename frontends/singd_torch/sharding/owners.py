"""Which process keeps the factors of which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from singd_torch._table import layer_bytes
from singd_torch.layers.layer import Layer

# In shares of the bytes of all.
MOST = 1.2


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


def resting(
    sizes: Mapping[nn.Parameter, int], owners: Mapping[nn.Parameter, int], processes: int
) -> set[nn.Parameter]:
    """The layers whose state rests in parts, lest a process have more than 1.2 of its share.

    They are the largest of the processes that have most, until none has more.
    """
    load = [0.0] * processes
    for weight, size in sizes.items():
        load[owners[weight]] += size
    found: set[nn.Parameter] = set()
    most = MOST * sum(load) / processes
    by_owner: list[list[nn.Parameter]] = [[] for _ in load]
    for weight in sorted(sizes, key=lambda weight: sizes[weight]):
        by_owner[owners[weight]].append(weight)
    while max(load) > most:
        owner = load.index(max(load))
        if not by_owner[owner]:
            break
        largest = by_owner[owner].pop()
        found.add(largest)
        load[owner] -= sizes[largest]
        load = [own + sizes[largest] / processes for own in load]
    return found
