"""One step of the layers: refresh the factors, precondition, move the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd_core.preconditioner import Factors
from singd_core.settings import Settings, rate
from singd_core.updates.weights import (
    bounded,
    couples_decay,
    direction,
    inner,
    kl_scale,
    weight_change,
)
from singd_torch._layers import Layer
from singd_torch._scaling import Scales

MOMENTUM = "momentum_buffer"


@dataclasses.dataclass(eq=False)
class Work:
    """What a step has found out of one layer before anything is changed."""

    layer: Layer
    s: Settings
    factors: Factors
    natural: Tensor
    energy: Tensor


def prepare(layer: Layer, factors: Factors, s: Settings, scales: Scales) -> Work:
    """The natural gradient of a layer, with its factors refreshed by the rows that are pending."""
    if layer.pending:
        lr_cov = rate(s.lr_cov, layer.group["steps"])
        factors = factors.refresh(layer.curvature(scales.rows), lr_cov, s)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
    gradient = layer.matrix(grads)
    if scales.grads is not None:
        gradient = gradient / scales.grads
    natural = factors.precondition(gradient)
    natural, energy = bounded(natural, inner(gradient, natural), s)
    return Work(layer, s, factors, natural, s.lr**2 * energy)


def apply(
    works: Sequence[Work],
    state: dict[Any, dict[str, Any]],
    settings_of: Callable[[nn.Parameter], Settings],
    total: Any,
    ok: Tensor | None,
) -> None:
    """Write the new factors, momenta and weights.

    Args:
        works: What `prepare` found.
        state: The optimizer's state.
        settings_of: The settings of a parameter's own group; a bias may have its own.
        total: The sum of the works' energies.
        ok: On an accelerator, whether the step may change anything; None where it is known to.
    """
    for work in works:
        layer, s, entries = work.layer, work.s, state[work.layer.weight]
        decay = None
        own = [settings_of(p) for p in layer.parameters]
        if any(map(couples_decay, own)):
            gammas = [o.weight_decay if couples_decay(o) else 0.0 for o in own]
            parts = zip(layer.parameters, gammas, strict=True)
            decay = layer.matrix([p * gamma for p, gamma in parts])
        momentum = entries.get(MOMENTUM)
        if momentum is None and s.momentum != 0.0:
            momentum = torch.zeros_like(work.natural, dtype=layer.dtypes[2])
        u, new_momentum = direction(work.natural, decay, momentum, kl_scale(total, s.kl_bound), s)
        factors = work.factors
        if ok is not None:
            u = torch.where(ok, u, 0.0)
            factors = factors.map(partial(_either, ok), layer.factors)  # type: ignore[arg-type]
            new_momentum = None if momentum is None else _either(ok, new_momentum, momentum)
        if factors is not layer.factors:
            layer.factors, layer.seen = factors, True
            entries.update(factors.named_arrays())
        if new_momentum is not None:
            entries[MOMENTUM] = new_momentum
        for p, part in zip(layer.parameters, layer.split(u), strict=True):
            change = weight_change(part, p, settings_of(p))
            p.add_(change if ok is None else torch.where(ok, change, 0.0))


def _either(ok: Tensor, new: Any, old: Any) -> Any:
    return new if new is old else torch.where(ok, new, old)
