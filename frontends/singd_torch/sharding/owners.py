"""Which process keeps a layer's factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from singd_core._settings import is_zero
from singd_core.rounding import is_rounded
from singd_torch._table import factor_bytes, layer_bytes
from singd_torch.layers.layer import Layer
from singd_torch.sharding.box import Box
from singd_torch.sharding.local import Blocks, local


@dataclasses.dataclass(frozen=True)
class Shares:
    """Who steps the layers of a model.

    Attributes:
        parts: The parts of layers that all processes step, by weight and process.
        whole: The other layers.
        owners: Which process steps each of these, by weight.
        resting: The layers that have their state in parts between steps.
    """

    parts: dict[nn.Parameter, list[Blocks]]
    whole: list[Layer]
    owners: dict[nn.Parameter, int]
    resting: set[nn.Parameter]

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        processes: int,
        known: Mapping[nn.Parameter, int],
        places: Mapping[nn.Parameter, Sequence[Box]] | None,
    ) -> Shares:
        """From shapes alone; `places` are the parts of parameters, if they are in parts.

        Layers of `known` owners stay there.
        """
        sizes = {layer.weight: layer_bytes(layer) for layer in layers}
        factors = {} if places is None else {one.weight: factor_bytes(one) for one in layers}
        parts = {} if places is None else local(layers, places, sizes, factors)
        whole = [layer for layer in layers if layer.weight not in parts]
        most = MOST * sum(sizes.values()) / processes
        others = sum(factors[w] + (sizes.pop(w) - factors[w]) // processes for w in parts)
        owners = balanced(sizes, processes, known)
        return cls(parts, whole, owners, resting(sizes, owners, [float(others)] * processes, most))


def reads_weights(layer: Layer) -> bool:
    """Whether a step reads the weights of a layer: they decay, or are rounded."""
    groups = [layer.group] if layer.bias_group is None else [layer.group, layer.bias_group]
    decay = not all(is_zero(group["weight_decay"]) for group in groups)
    return decay or is_rounded(layer.group["rounding"], [p.dtype for p in layer.parameters])


# In shares of the bytes of all: a process has at most 1.2 with what AdamW keeps.
MOST = 1.19


def balanced(
    sizes: Mapping[nn.Parameter, int], processes: int, known: Mapping[nn.Parameter, int]
) -> dict[nn.Parameter, int]:
    """The owner of each layer, by its weight: the largest first, each to who has least.

    It follows from the sizes alone, so that all processes find the same. Those that are `known`
    stay where they are.
    """
    load = [0] * processes
    found = {weight: known[weight] for weight in sizes if weight in known}
    for weight, owner in found.items():
        load[owner] += sizes[weight]
    for weight in sorted(sizes, key=lambda weight: -sizes[weight]):
        if weight not in found:
            found[weight] = load.index(min(load))
            load[found[weight]] += sizes[weight]
    return found


def resting(
    sizes: Mapping[nn.Parameter, int],
    owners: Mapping[nn.Parameter, int],
    load: Sequence[float],
    most: float,
) -> set[nn.Parameter]:
    """The layers whose state rests in parts, lest a process have more than `most` bytes.

    They are the largest of the processes that have most, until none has more. `load` is what each
    process has beside them.
    """
    load, processes = list(load), len(load)
    for weight, size in sizes.items():
        load[owners[weight]] += size
    found: set[nn.Parameter] = set()
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
