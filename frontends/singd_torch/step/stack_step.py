"""One step of a stack of layers: refresh the factors, find the direction, move the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import sum_of_squares, widen
from singd_core._layer_state import NAMES
from singd_core._settings import Settings, is_due, rate_of_factors
from singd_core.curvature import Curvature
from singd_core.layers import LayerKind
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import WHOLE, Place, Rounding, identity
from singd_core.rules import Factors, Shampoo, by_rows
from singd_core.step import Direction, couples_decay, direction, has_momentum, weight_change
from singd_torch.capture.scaling import Scales
from singd_torch.step.curvatures import curvature as curvature_of
from singd_torch.step.levels import level
from singd_torch.step.rounding import compensations, round_to
from singd_torch.step.solve import by_pieces
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.join import join
from singd_torch.tensors.pieces import cut, on_host, placed
from singd_torch.tensors.select import either

# Weights of so many numbers, and stacks of smaller ones, are changed by one call.
_JOINED = 1 << 13


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
    settings: Callable[[nn.Parameter], Settings]
    scales: Scales
    ok: Tensor | None
    bad: Tensor | None


def advance(stack: Stack, state: State, given: Gradients) -> Any:
    """Write the new factors, momenta and weights of a stack.

    Returns:
        Whether it moved: a bool, or 0-d on an accelerator. It did not if products left the range of
        its dtype, and nothing but momenta of gradients was changed then.
    """
    layer = stack.layers[0]
    own, ok = [given.settings(p) for p in layer.parameters], given.ok
    s = own[0]
    gradient, rounding = stack.joined(given.of), stack.rounding(s)
    factors, preconditioner = refreshed(stack, s, given.scales, gradient, rounding)
    decay = None
    if any(map(couples_decay, own)):
        decay = stack.joined(partial(coupled_decay, given.settings))
    if stack.momenta is None and has_momentum(s):
        stack.begin(state, s)
    if ok is not None:
        s = masked(s, ok, gradient[0])
        gradient = [torch.where(ok, g, 0.0) for g in gradient]  # NaN times 0 is NaN
        if decay is not None:
            decay = [torch.where(ok, w, 0.0) for w in decay]
    found = stack.run(
        _direction if stack.compile is None else _direction_anew,
        *(layer.kind, s, preconditioner or factors, factors.averages.t_U),
        *(tuple(layer.weight.shape), gradient, decay, stack.momenta, stack.late),
        _squares(stack, given, gradient),
    )
    moves: Any
    if type(factors) is not type(stack.factors):  # once, so the host may wait to know
        if bool(found.finite if ok is None else ok & found.finite):
            stack.go_on_by_rows(state)
        else:
            factors = stack.factors  # type: ignore[assignment]
    if ok is None:
        moves = bool(found.finite)
    else:
        moves = ok & found.finite
        found = _kept(found, moves, stack)
        if factors is not stack.factors:
            factors = factors.map(partial(either, moves), stack.factors)  # type: ignore[arg-type]
    if moves is False:  # of the host
        return False
    if stack.momenta is not None and found.momenta is not None:
        stack.hold_momenta(found.momenta, found.late, state)
    if factors is not stack.factors:
        known = preconditioner if ok is None and stack.compile is None else None
        stack.hold(factors, state, seen=True, preconditioner=known)
        if stack.capturable and ok is not None:  # steps that follow make nothing that is kept
            made = factors.preconditioner(stack.uses(s), balanced=s.normalized)
            stack.precondition_with(made)
    level(stack, s, found.natural, moves)
    if stack.report is not None:
        lengths = torch.stack([sum_of_squares(_rows(u, stack), 1) for u in found.parts]).sum(0)
        update = s.lr * found.scale * lengths.sqrt()
        stack.report |= {"agreement": found.agreement, "update": update}
    move(stack, found, own, None if ok is None else moves, rounding, state)
    return moves


def refreshed(
    stack: Stack,
    s: Settings,
    scales: Scales,
    gradient: Sequence[Tensor],
    rounding: Rounding | None,
    learned: Curvature | None = None,
) -> tuple[Factors, Preconditioner | None]:
    """The factors, refreshed by rows that are pending or by the gradient of what has none.

    And what preconditions with them. What is `learned` of the gradient may be known.
    """
    layer, factors = stack.layers[0], stack.factors
    assert factors is not None
    steps = layer.group["steps"]
    if layer.pending or learns_now(stack, s):
        lr_cov = rate_of_factors(steps, s)
        if stack.compile is not None:  # else each value of a schedule would be compiled anew
            lr_cov = torch.zeros_like(factors.averages.k) + lr_cov
        if learned is not None:
            curvature = learned
        elif not layer.pending:
            curvature = stack.run(_curvature, factors, layer.kind, *gradient)
        else:
            curvature = curvature_of(stack.layers, scales.rows)
            factors = by_rows(factors, s) if isinstance(factors, Shampoo) else factors
        for one in stack.layers:  # its rows are as large as its factors, and so is the curvature
            one.pending = {}
        factors = stack.run(_refresh, factors, curvature, lr_cov, s, stack.report, rounding)
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


def _curvature(factors: Shampoo, kind: LayerKind, *gradient: Tensor) -> Curvature:
    return factors.curvature(kind.matrix(*gradient))


def _refresh(factors: Factors, curvature: Curvature, *given: Any) -> Factors:
    return factors.refresh(curvature, *given)


def _direction(
    kind: Any, s: Settings, factors: Any, t_U: Tensor, shape: Any, gradient: Any, decay: Any,
    momenta: Any, late: Any, squares: Any,
) -> Direction:  # fmt: skip
    """`direction`, by pieces of large matrices, and with momenta written where they are."""
    owned = s.normalized and s.nesterov and momenta is not None  # an average of its own
    precondition = partial(by_pieces, factors, owned)
    arguments = precondition, t_U, shape, gradient, decay, momenta, late, squares
    # what products made is known to be finite only afterwards, on an accelerator
    donate = s.normalized or not isinstance(s.lr, Tensor)
    return direction(kind, s, *arguments, donate=donate)


def _direction_anew(kind: Any, s: Settings, factors: Any, *arguments: Any) -> Direction:
    """`_direction` for compilers, which find out by themselves what can be overwritten."""
    precondition = partial(factors.precondition, balanced=s.normalized)
    return direction(kind, s, precondition, *arguments)


def move(
    stack: Stack,
    found: Direction,
    settings: Sequence[Settings],
    moves: Tensor | None,
    rounding: Rounding | None,
    state: State,
    parts: Sequence[Place] = (WHOLE, WHOLE),
) -> None:
    """Change the weights and biases; `parts` says where those stand that are parts of more."""
    places = zip(*(layer.parameters for layer in stack.layers), strict=True)
    roles = zip(NAMES, places, found.parts, settings, parts, strict=False)
    for name, place, part, own, where in roles:
        own = own if moves is None else masked(own, moves, part)
        trained = [p.grad is not None for p in place]  # one may have been frozen since
        rounded = rounding if rounding is not None and rounding.rounds(name) else None
        if len(place) > 1 and place[0].numel() <= _JOINED and all(trained):
            joined = join(place)
            if rounded is None:
                weight_change(part, found.scale, joined, own, onto=joined)
            else:
                lost = compensations(place, settings[0], state)
                round_to(joined, part, found.scale, own, rounded, name, lost, moves)
            torch._foreach_copy_(place, stack.split(joined))  # type: ignore[arg-type]
            continue
        each = zip(stack.layers, stack.split(part), _each(found.scale, len(place)), strict=True)
        for (layer, u, c), weight in compress(zip(each, place, strict=True), trained):
            if rounded is not None:
                how = rounded._replace(owner=identity(layer.name))
                lost = compensations([weight], settings[0], state)
                round_to(weight, u, c, own, how, name, lost, moves, where)
                continue
            for piece, change in zip(cut(weight), cut(u), strict=True):
                weight_change(change, c, piece, own, onto=piece)


def _each(scale: Any, n: int) -> Sequence[Any]:
    """The scale of each of n layers, numbers of the host where they can be."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return [scale] * n
    return scale.tolist() if on_host(scale) else scale.unbind()


def _squares(stack: Stack, given: Gradients, gradient: Sequence[Tensor]) -> Any:
    """‖∇W‖² of each matrix, from the norms of the gradients where those are of matrices."""
    layer = stack.layers[0]
    if layer.shape[0]:  # a gradient is that of several
        weight, *bias = gradient
        total = sum_of_squares(layer.kind.matrix(weight), 2)
        for b in bias:
            total = total + sum_of_squares(b.reshape(*total.shape, -1), 1)
        return total
    squares = [
        sum(given.norms[p] ** 2 for p in one.parameters if p.grad is not None)
        for one in stack.layers
    ]
    if len(squares) == 1 and stack.compile is None:
        return squares[0]
    like = stack.factors.averages.k  # type: ignore[union-attr]
    if isinstance(squares[0], Tensor):
        return torch.stack(squares).to(like).reshape(like.shape)
    return like.new_tensor(squares).reshape(like.shape)


def _kept(found: Direction, moves: Tensor, stack: Stack) -> Direction:
    """A direction that is zero unless the stack moves."""
    parts = [torch.where(moves, u, 0.0) for u in found.parts]
    late = found.late
    if late is not None and stack.late is not None:
        late = late.map(partial(either, moves), stack.late)
    scale = found.scale if isinstance(found.scale, float) else torch.where(moves, found.scale, 0.0)
    momenta = found.momenta
    if momenta is not None and stack.momenta is not None:
        pairs = zip(momenta, stack.momenta, strict=True)
        momenta = [either(moves, new, old) for new, old in pairs]
    return found._replace(parts=parts, momenta=momenta, late=late, scale=scale)


def _rows(u: Tensor, stack: Stack) -> Tensor:
    like = stack.factors.averages.k  # type: ignore[union-attr]
    wide: Tensor = widen(u)
    return wide.reshape(*like.shape, -1)


def masked(s: Settings, ok: Tensor, like: Tensor) -> Settings:
    """The settings with which zeros in place of a gradient change nothing unless ok."""
    dtype = widen(like[..., :0]).dtype
    momentum, lr = (placed(v, dtype, ok.device) for v in (s.momentum, s.lr))
    return dataclasses.replace(
        s, momentum=torch.where(ok, momentum, 1.0), lr=torch.where(ok, lr, 0.0)
    )


def coupled_decay(settings_of: Callable[[nn.Parameter], Settings], p: nn.Parameter) -> Tensor:
    """What a decay adds to what the momentum averages."""
    s = settings_of(p)
    return p * (s.weight_decay if couples_decay(s) else 0.0)
