"""One step of a stack of layers: refresh the factors, find the direction, move the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import sum_of_squares, widen
from singd_core._layer_state import NAMES
from singd_core._settings import StepSettings
from singd_core.layers import LayerKind
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import WHOLE, Place, Rounding, identity
from singd_core.rules import Factors, inputs_of
from singd_core.rules.centering import InputMean
from singd_core.step import Direction, direction, weight_change
from singd_core.without_mean import without_mean
from singd_torch.step.begun import Gradients, begin, masked, on_device, same, settled
from singd_torch.step.levels import level
from singd_torch.step.rounding import compensations, round_to
from singd_torch.step.solve import by_pieces
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.join import join
from singd_torch.tensors.pieces import cut, on_host, placed
from singd_torch.tensors.select import either

# Weights of so many numbers, and stacks of smaller ones, are changed by one call.
_JOINED = 1 << 13


def advance(stack: Stack, state: State, given: Gradients) -> Any:
    """Write the new factors, momenta and weights of a stack.

    Returns:
        Whether it moved: a bool, or 0-d on an accelerator. It did not if products left the range of
        its dtype, and nothing but momenta of gradients was changed then.
    """
    layer, ok = stack.layers[0], given.ok
    own = [given.settings(p) for p in layer.parameters]
    s, rounding, gradient, decay, factors, preconditioner = begin(stack, state, given)
    compiled, inputs = stack.compile is not None, inputs_of(factors)
    of_layer = tuple(layer.weight.shape), gradient, decay, stack.momenta, stack.late
    how = layer.kind, on_device(s, layer.weight) if compiled else s, preconditioner or factors
    if inputs is None:
        t_U, squares = factors.averages.t_U, _squares(stack, given, gradient)
        found = stack.run(_direction, *how, t_U, *of_layer, squares)
    else:
        inputs, ratio = rates(own, inputs, compiled=compiled)
        found = stack.run(_without_mean, *how, inputs, *of_layer, ratio)
    moves: Any
    if ok is None:
        moves = bool(found.finite)
    else:
        moves = ok & found.finite
        found = _kept(found, moves, stack)
    factors = settled(stack, factors, moves, state)
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
        of_matrix = found.parts if inputs is None else found.parts[:1]
        lengths = torch.stack([sum_of_squares(_rows(u, stack), 1) for u in of_matrix]).sum(0)
        update = _rate(stack, s, given) * found.scale * lengths.sqrt()
        stack.report |= {"agreement": found.agreement, "update": update}
    move(stack, found, given.settings, None if ok is None else moves, rounding, state)
    return moves


def _direction(
    kind: LayerKind, s: StepSettings, by: Preconditioner | Factors, t_U: Tensor, *of_layer: Any
) -> Direction:
    """The direction of a stack."""
    precondition, donate = _precondition(by, s, of_layer[3])
    return direction(kind, s, precondition, t_U, *of_layer, donate=donate)


def _without_mean(
    kind: LayerKind, s: StepSettings, by: Preconditioner | Factors, inputs: Any, *of_layer: Any
) -> Direction:
    """The direction of weights that learn from gradients, with their biases."""
    precondition, donate = _precondition(by, s, of_layer[3])
    made = by if isinstance(by, Preconditioner) else by.preconditioner(1, balanced=True)
    *known, ratio = of_layer
    both = {"ratio": ratio, "donate": donate}
    return without_mean(kind, s, precondition, made.left, inputs, *known, **both)


def _precondition(
    by: Preconditioner | Factors, s: StepSettings, momenta: Any
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What makes a natural gradient, and whether momenta are written where they are.

    By pieces of large matrices. Compilers get the factors, and find that out by themselves.
    """
    if not isinstance(by, Preconditioner):
        return partial(by.precondition, balanced=s.normalized), False
    owned = s.normalized and s.nesterov and momenta is not None  # an average of its own
    # what products made is known to be finite only afterwards, on an accelerator
    return partial(by_pieces, by, owned), s.normalized or not isinstance(s.lr, Tensor)


def rates(
    own: Sequence[StepSettings], inputs: InputMean, *, compiled: bool
) -> tuple[InputMean, Any]:
    """The mean of the inputs, and the rate of the weight in shares of the rate of the bias.

    A bias that rests cannot make up for a mean: there is none for it.
    """
    of_weight, of_bias = own[0].lr, own[-1].lr
    if same(of_bias, of_weight):
        return inputs, 1.0
    moves = of_bias > 0.0
    ratio: Any
    if isinstance(moves, Tensor):
        ratio = torch.where(moves, of_weight / of_bias, 0.0)
    else:
        ratio = of_weight / of_bias if moves else 0.0
        if isinstance(ratio, float) and ratio == 1.0:
            return inputs, ratio
        if compiled:  # else each value of a schedule would be compiled anew
            ratio = placed(ratio, inputs.mean.dtype, inputs.mean.device)
    return dataclasses.replace(inputs, mean=inputs.mean * moves), ratio


def move(
    stack: Stack,
    found: Direction,
    settings: Callable[[nn.Parameter], StepSettings],
    moves: Tensor | None,
    rounding: Rounding | None,
    state: State,
    parts: Sequence[Place] = (WHOLE, WHOLE),
) -> None:
    """Change the weights and biases; `parts` says where those stand that are parts of more."""
    places = zip(*(layer.parameters for layer in stack.layers), strict=True)
    s = settings(stack.layers[0].weight)
    roles = zip(NAMES, places, found.parts, parts, strict=False)
    for (name, place, part, where), scale in zip(roles, found.scales, strict=False):
        of_each = [settings(p) for p in place]
        if moves is not None:
            known = {id(own): own for own in of_each}
            of_groups = {key: masked(own, moves, part) for key, own in known.items()}
            of_each = [of_groups[id(own)] for own in of_each]
        trained = [p.grad is not None for p in place]  # one may have been frozen since
        rounded = rounding if rounding is not None and rounding.rounds(name) else None
        alike = all(same(own.lr, of_each[0].lr) for own in of_each)
        alike = alike and all(same(own.weight_decay, of_each[0].weight_decay) for own in of_each)
        if len(place) > 1 and place[0].numel() <= _JOINED and all(trained) and alike:
            joined, own = join(place), of_each[0]
            if rounded is None:
                weight_change(part, scale, joined, own, onto=joined)
            else:
                lost = compensations(place, s, state)
                round_to(joined, part, scale, own, rounded, name, lost, moves)
            torch._foreach_copy_(place, stack.split(joined))  # type: ignore[arg-type]
            continue
        each = zip(stack.layers, stack.split(part), _each(scale, len(place)), of_each, strict=True)
        for (layer, u, c, own), weight in compress(zip(each, place, strict=True), trained):
            if rounded is not None:
                how = rounded._replace(owner=identity(layer.name))
                lost = compensations([weight], s, state)
                round_to(weight, u, c, own, how, name, lost, moves, where)
                continue
            for piece, change in zip(cut(weight), cut(u), strict=True):
                weight_change(change, c, piece, own, onto=piece)


def _rate(stack: Stack, s: StepSettings, given: Gradients) -> Any:
    """The rate of the weights: a number, or one for each where groups have their own."""
    rates = [given.settings(layer.weight).lr for layer in stack.layers]
    if all(same(rate, rates[0]) for rate in rates):
        return s.lr
    like = stack.factors.averages.k  # type: ignore[union-attr]
    return like.new_tensor(rates).view(-1, *(1,) * (like.ndim - 1))


def _each(scale: Any, n: int) -> Sequence[Any]:
    """The scale of each of n layers, numbers of the host where they can be."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return [scale] * n
    return scale.tolist() if on_host(scale) else scale.unbind()


def _squares(stack: Stack, given: Gradients, gradient: Sequence[Tensor]) -> Any:
    """‖∇W‖² of each matrix, from the norms of the gradients where those are of matrices."""
    layer = stack.layers[0]
    if layer.shape[0]:  # a gradient is of several matrices
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
