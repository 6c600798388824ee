"""What a step has of a stack before it finds the direction, with the factors refreshed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from singd_core._array import widen
from singd_core._settings import Settings, StepSettings, is_due, rate_of_factors
from singd_core.curvature import Curvature
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import Rounding
from singd_core.rules import Factors, Shampoo, by_rows
from singd_core.step import couples_decay, has_momentum
from singd_core.without_mean import learned
from singd_torch.capture.scaling import Scales
from singd_torch.step.curvatures import curvature as curvature_of
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.pieces import brought, placed
from singd_torch.tensors.select import either


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of a step, and what is known of them before anything is changed.

    Attributes:
        of: The gradient of a parameter, without the scale of the loss.
        raw: The gradient of a parameter, with it.
        norms: The norm of each gradient: a number, or 0-d on an accelerator.
        settings: The settings of a parameter's own group in this step; a bias may have its own.
        scales: What the loss was multiplied by.
        ok: On an accelerator, whether the step may change anything; None where it is known to.
        bad: Where there is an `ok`, whether the step may change nothing.
    """

    of: Callable[[nn.Parameter], Tensor]
    raw: Callable[[nn.Parameter], Tensor]
    norms: Mapping[nn.Parameter, Any]
    settings: Callable[[nn.Parameter], StepSettings]
    scales: Scales
    ok: Tensor | None
    bad: Tensor | None

    def on(self, device: torch.device) -> Gradients:
        """The same for the parameters of one device, where a model has some on several."""
        known: dict[int, StepSettings] = {}

        def settings(p: nn.Parameter) -> StepSettings:
            s = self.settings(p)
            if id(s) not in known:  # one object for each group
                known[id(s)] = brought(s, device)
            return known[id(s)]

        own = dataclasses.replace(self, settings=settings, scales=brought(self.scales, device))
        return brought(own, device)

    def allows(self, moves: Tensor) -> Tensor:
        """What moves, where the step may change anything."""
        return moves if self.ok is None else self.ok & moves


class Begun(NamedTuple):
    """What a step has of a stack before it finds the direction.

    Attributes:
        s: The settings of the weights, masked on an accelerator.
        rounding: How arrays are stored, None if to the nearest number.
        gradient: The gradients of weights and of biases, zeros unless ok.
        decay: What a decay adds to them, None without.
        factors: The new factors.
        preconditioner: What preconditions with them, None if the factors do.
    """

    s: StepSettings
    rounding: Rounding | None
    gradient: Sequence[Tensor]
    decay: Sequence[Tensor] | None
    factors: Factors
    preconditioner: Preconditioner | None


def begin(stack: Stack, state: State, given: Gradients, known: Curvature | None = None) -> Begun:
    """Refresh the factors, and have what the direction is made of; `known` as in `refreshed`."""
    own, ok = [given.settings(p) for p in stack.layers[0].parameters], given.ok
    s = own[0]
    gradient, rounding = stack.joined(given.of), stack.rounding(s)
    if ok is not None:
        gradient = [torch.where(ok, g, 0.0) for g in gradient]  # NaN times 0 is NaN
    factors, preconditioner = refreshed(stack, s, given.scales, gradient, rounding, known)
    decay = None
    if any(map(couples_decay, own)):
        decay = stack.joined(partial(coupled_decay, given.settings))
    if stack.momenta is None and has_momentum(s):
        stack.begin(state, s)
    if ok is not None:
        s = masked(s, ok, gradient[0])
        if decay is not None:
            decay = [torch.where(ok, w, 0.0) for w in decay]
    return Begun(s, rounding, gradient, decay, factors, preconditioner)


def settled(stack: Stack, factors: Factors, moves: Any, state: State) -> Factors:
    """The new factors, or those that the stack has where it does not move."""
    if type(factors) is not type(stack.factors):  # once, so the host may wait to know
        if bool(moves):
            stack.go_on_by_rows(state)
        else:
            factors = stack.factors  # type: ignore[assignment]
    if isinstance(moves, Tensor) and factors is not stack.factors:
        factors = factors.map(partial(either, moves), stack.factors)  # type: ignore[arg-type]
    return factors


def refreshed(
    stack: Stack,
    s: Settings,
    scales: Scales,
    gradient: Sequence[Tensor],
    rounding: Rounding | None,
    known: Curvature | None = None,
) -> tuple[Factors, Preconditioner | None]:
    """The factors, refreshed by rows that are pending or by the gradient of what has none.

    And what preconditions with them. What the gradient tells may be `known`.
    """
    layer, factors = stack.layers[0], stack.factors
    assert factors is not None
    steps = layer.group["steps"]
    if layer.pending or learns_now(stack, s):
        lr_cov = rate_of_factors(steps, s)
        if stack.compile is not None:  # else each value of a schedule would be compiled anew
            lr_cov = torch.zeros_like(factors.averages.k) + lr_cov
        curvature = known
        if layer.pending:
            curvature = curvature_of(stack.layers, scales.rows)
            factors = by_rows(factors, s) if isinstance(factors, Shampoo) else factors
        for one in stack.layers:  # its rows are as large as its factors, and so is the curvature
            one.pending = {}
        how = lr_cov, s, stack.report, rounding
        if curvature is None:
            factors = stack.run(learned, factors, layer.kind, gradient, *how)
        else:
            factors = stack.run(_refresh, factors, curvature, *how)
        stack.preconditioner = None
    elif stack.preconditioner is not None:
        return factors, stack.preconditioner
    if stack.compile is not None:
        return factors, None
    kept = factors.preconditioner(stack.uses(s), balanced=s.normalized)
    return factors, stack.precondition_with(kept) if factors is stack.factors else kept


def learns_now(stack: Stack, s: Settings) -> bool:
    """Whether the gradient of this step refreshes the factors."""
    layer, factors = stack.layers[0], stack.factors
    if layer.pending or factors is None or factors.has_rows:
        return False
    return is_due(layer.group["steps"], s) or not layer.seen


def _refresh(factors: Factors, curvature: Curvature, *given: Any) -> Factors:
    return factors.refresh(curvature, *given)


def on_device(s: StepSettings, p: Tensor) -> StepSettings:
    """With rates as tensors: what is compiled takes them as such, and is then not compiled anew."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    lr, share = (placed(rate, dtype, p.device) for rate in (s.lr, s.share))
    momentum = placed(s.momentum, dtype, p.device) if has_momentum(s) else s.momentum
    return dataclasses.replace(s, lr=lr, momentum=momentum, share=share)


def masked(s: StepSettings, ok: Tensor, like: Tensor) -> StepSettings:
    """The settings with which zeros in place of a gradient change nothing unless ok."""
    dtype = widen(like[..., :0]).dtype
    momentum, lr = (placed(v, dtype, ok.device) for v in (s.momentum, s.lr))
    decay = s.weight_decay
    return dataclasses.replace(
        s,
        momentum=torch.where(ok, momentum, 1.0),
        lr=torch.where(ok, lr, 0.0),
        weight_decay=zero_unless(ok, decay) if isinstance(decay, Tensor) else decay,
    )


def same(rate: float | Tensor, other: float | Tensor) -> bool:
    """Whether two rates are known to be the same without a wait for the device."""
    if isinstance(rate, Tensor) or isinstance(other, Tensor):
        return rate is other
    return rate == other


def zero_unless(ok: Tensor, rate: float | Tensor) -> Tensor:
    """The rate, or zero: of a tensor that is not finite too, without a copy to the device."""
    found = ok * rate
    return found.nan_to_num_(0.0, 0.0, 0.0) if isinstance(rate, Tensor) else found


def coupled_decay(settings_of: Callable[[nn.Parameter], Settings], p: nn.Parameter) -> Tensor:
    """What a decay adds to what the momentum averages."""
    s = settings_of(p)
    return p * (s.weight_decay if couples_decay(s) else 0.0)
