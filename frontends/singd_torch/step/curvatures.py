"""The curvature that pending rows tell, of equal layers together or of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core.curvature import Curvature, shares
from singd_torch.layers.layer import Key, Layer
from singd_torch.layers.pending import Pending
from singd_torch.step.stack import Stack


def curvature(layers: Sequence[Layer], grad_scale: Any) -> Curvature:
    """The one of the rows of equal layers, of gradients that were multiplied by `grad_scale`."""
    return _curvature(_pending(layers), len(layers), grad_scale)


def curvatures(stacks: Sequence[Stack], grad_scale: Any) -> list[Curvature]:
    """The curvature of each stack; sums are divided together, where the host knows by what."""
    found: list[Curvature] = []
    known: dict[int, list[float]] = {}
    for i, stack in enumerate(stacks):
        pending = _pending(stack.layers)
        (of_part, _), rows = next(iter(pending.items()))
        inputs, N, outputs, M = rows.terms(grad_scale)
        if (
            len(pending) > 1
            or of_part is not None
            or isinstance(N, Tensor)
            or isinstance(M, Tensor)
        ):
            found.append(_curvature(pending, len(stack.layers), grad_scale))
            continue
        sums = Curvature(inputs.S, outputs.S, inputs.squares, outputs.squares)
        a, b, c, d = shares(N, M, inputs.S.shape[-1], outputs.S.shape[-1])
        sides = (inputs.S, a), (outputs.S, b)
        known[i] = [x for S, x in sides for _ in S.named_arrays()] + [c, d]
        found.append(sums)
    arrays = [a for i in known for _, a in found[i].named_arrays()]
    if arrays:
        divided = iter(torch._foreach_mul(arrays, [x for own in known.values() for x in own]))
        for i in known:
            found[i] = found[i].map(lambda _: next(divided))
    return found


def _curvature(found: Mapping[Key, Pending], n: int, grad_scale: Any) -> Curvature:
    """The one of the pending rows of n equal layers, by part and role."""
    first, *others = [Curvature.of(*rows.terms(grad_scale)) for rows in found.values()]
    if next(iter(found))[0] is not None:  # the parts of a stacked linear layer
        return first.map(lambda *arrays: torch.stack(arrays, int(n > 1)), *others)
    return first.joined(others[0]) if others else first


def _pending(layers: Sequence[Layer]) -> dict[Key, Pending]:
    """The pending rows of equal layers, by part and role."""
    return {
        key: Pending.joined([layer.pending[key] for layer in layers])
        for key in sorted(layers[0].pending, key=_order)
    }


def _order(key: Key) -> tuple[int, bool]:
    part, swapped = key
    return -1 if part is None else part, swapped
