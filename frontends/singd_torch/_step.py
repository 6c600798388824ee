"""One step of the layers: refresh the factors, precondition, move the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import total, widen
from singd_core.preconditioner import Factors
from singd_core.settings import Settings, rate
from singd_core.updates.weights import (
    couples_decay,
    direction,
    inner,
    kl_scale,
    rms_scale,
    weight_change,
)
from singd_torch._join import join
from singd_torch._scaling import Scales
from singd_torch._stacks import Stack, State


@dataclasses.dataclass(eq=False)
class Work:
    """What a step has found out of a stack of layers before anything is changed.

    Attributes:
        stack: The layers.
        s: Their settings.
        factors: Their refreshed factors, or those they had.
        natural: The natural gradient.
        scale: What its bound scales it by.
        energy: lr² ⟨∇W, n⟩, 0-d.
    """

    stack: Stack
    s: Settings
    factors: Factors
    natural: Tensor
    scale: Any
    energy: Tensor


def prepare(stack: Stack, s: Settings, scales: Scales) -> Work:
    """The natural gradients of layers, their factors refreshed by the rows that are pending.

    A stack that has a report is told there of the refresh.
    """
    layer, factors = stack.layers[0], stack.factors
    assert factors is not None
    if layer.pending:
        lr_cov = rate(s.lr_cov, layer.group["steps"])
        factors = factors.refresh(stack.curvature(scales.rows), lr_cov, s, stack.report)
        preconditioner = factors.preconditioner(1)
    else:
        if stack.preconditioner is None:
            stack.preconditioner = factors.preconditioner(s.T)
        preconditioner = stack.preconditioner
    gradient = stack.matrix(_gradient)
    if scales.grads is not None:
        gradient = gradient / scales.grads
    natural = preconditioner(gradient)
    scale = rms_scale(natural, s.rms_bound)
    energy = total(scale * inner(gradient, natural))
    return Work(stack, s, factors, natural, scale, s.lr**2 * energy)


def apply(
    works: Sequence[Work],
    state: State,
    settings_of: Callable[[nn.Parameter], Settings],
    energy: Any,
    ok: Tensor | None,
) -> None:
    """Write the new factors, momenta and weights.

    Args:
        works: What `prepare` found.
        state: The optimizer's state.
        settings_of: The settings of a parameter's own group; a bias may have its own.
        energy: The sum of the works' energies.
        ok: On an accelerator, whether the step may change anything; None where it is known to.
    """
    kl = {id(work.s): kl_scale(energy, work.s.kl_bound) for work in works}
    for work in works:
        stack, s, factors = work.stack, work.s, work.factors
        parameters, decay = stack.layers[0].parameters, None
        if any(couples_decay(settings_of(p)) for p in parameters):
            decay = stack.matrix(partial(_coupled_decay, settings_of))
        momentum = stack.momentum
        if momentum is None and s.momentum != 0.0:
            momentum = torch.zeros_like(work.natural, dtype=stack.layers[0].dtypes[2])
        scale = work.scale * kl[id(s)]
        u, moved = direction(work.natural, decay, momentum, scale, s)
        if stack.report is not None:
            norm = torch.linalg.vector_norm(widen(u), dim=(-2, -1))
            stack.report |= {"natural_scale": scale, "update": s.lr * norm}
        if ok is not None:
            u = torch.where(ok, u, 0.0)
            factors = factors.map(partial(_either, ok), stack.factors)  # type: ignore[arg-type]
            moved = None if momentum is None else _either(ok, moved, momentum)
        if factors is not stack.factors:
            stack.hold(factors, state, seen=True)
        if moved is not None:
            stack.hold_momentum(moved, state)
        places = zip(*(layer.parameters for layer in stack.layers), strict=True)
        for place, part in zip(places, stack.layers[0].split(u), strict=True):
            change = weight_change(part, join(place), settings_of(place[0]))
            if ok is not None:
                change = torch.where(ok, change, 0.0)
            torch._foreach_add_(place, stack.split(change))  # type: ignore[arg-type]


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _coupled_decay(settings_of: Callable[[nn.Parameter], Settings], p: nn.Parameter) -> Tensor:
    s = settings_of(p)
    return p * (s.weight_decay if couples_decay(s) else 0.0)


def _either(ok: Tensor, new: Any, old: Any) -> Any:
    return new if new is old else torch.where(ok, new, old)
