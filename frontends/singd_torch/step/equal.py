"""Which layers are equal, so that they step as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from singd_torch._groups import likeness
from singd_torch.layers.layer import Layer
from singd_torch.step.stack import Stack

# Weights of more numbers step alone: to join their gradients costs more than the calls saved.
_LARGEST = 1 << 17


def stacks(layers: Iterable[Layer], *, by_group: bool) -> list[Stack]:
    """The layers, the equal and small ones of them together; those of each group, if `by_group`.

    Of layers in one memory each steps alone: what is written for one would be lost by the other.
    """
    layers = list(layers)
    memory = Counter(place for layer in layers for place in _places(layer))
    apart = {layer for layer in layers if any(memory[place] > 1 for place in _places(layer))}
    found: dict[Any, list[Layer]] = {}
    for layer in layers:
        key = layer if layer in apart else _likeness(layer, by_group=by_group)
        found.setdefault(key, []).append(layer)
    return [Stack(equal, shares_memory=equal[0] in apart) for equal in found.values()]


def parted(stack: Stack, live: Sequence[Layer]) -> list[Stack]:
    """The stack; or smaller stacks in its place from now on, if some layers do not step or differ.

    `live` are the layers that step. Layers differ if their rows are of other kinds or numbers.
    """
    if not all(_alike(layer, live[0]) for layer in live[1:]):
        return [Stack([layer]) for layer in stack.layers]
    if len(live) == len(stack.layers):
        return [stack]
    moving = set(live)
    return [Stack(live), *(Stack([layer]) for layer in stack.layers if layer not in moving)]


def _places(layer: Layer) -> list[Any]:
    """Where the parameters of a layer begin in memory."""
    return [(p.untyped_storage()._cdata, p.storage_offset()) for p in layer.parameters]


def _likeness(layer: Layer, *, by_group: bool) -> Any:
    """What equal layers have in common."""
    weight, groups = layer.weight, (layer.group, layer.bias_group)
    if weight.numel() > _LARGEST or not layer.kind.stacks:
        return layer
    return (
        *(layer.kind, layer.has_rows, layer.structures, tuple(layer.roles())),
        layer.has_rows or layer.seen,  # the first gradient of a layer refreshes its factors
        *(layer.bias is not None, tuple(map(id, groups)) if by_group else likeness(*groups)),
        *(weight.shape, weight.dtype, weight.device, layer.dtypes),
    )


def _alike(layer: Layer, other: Layer) -> bool:
    """Whether the layers have rows of the same kinds and numbers, if any."""
    return layer.pending.keys() == other.pending.keys() and all(
        pending.joins(other.pending[key]) for key, pending in layer.pending.items()
    )
