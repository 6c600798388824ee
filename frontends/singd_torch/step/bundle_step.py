"""One step of a bundle: as in `stack_step` for one stack, with one operation for all stacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from singd_core._array import ranged, widen
from singd_core._settings import StepSettings, is_bound
from singd_core.length import sized
from singd_core.rounding import is_rounded
from singd_core.rules import IKFAC, Shampoo, inputs_of
from singd_core.step import averaged, couples_decay, decouples_decay, squares_of
from singd_torch.layers.layer import Layer
from singd_torch.step.begun import Gradients, zero_unless
from singd_torch.step.bundle import Bundle
from singd_torch.step.bundle_centering import steps_of_biases, take_out_means
from singd_torch.step.bundle_refresh import precondition, refresh
from singd_torch.step.levels import measure
from singd_torch.step.rounding import compensations
from singd_torch.step.solve import by_pieces
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.matrices import Matrices
from singd_torch.tensors.scratch import constant
from singd_torch.tensors.select import spread


def steps_so(stack: Stack, given: Gradients) -> bool:
    """Whether a stack can step in a bundle: under the rule of the default, and as it is."""
    layer, factors = stack.layers[0], stack.factors
    own = [given.settings(p) for p in layer.parameters]
    s = own[0]
    if type(factors) is Shampoo:
        # rows that have come make factors of another rule; a bias of another rate steps with a mean
        alike = inputs_of(factors) is None or _same(own[-1].lr, s.lr)
        fits = alike and not layer.pending
    else:
        fits = type(factors) is IKFAC
    return (
        stack.compile is None
        and fits
        and _has_one_precision(layer)
        and layer.weight.numel() > 0
        and s.normalized
        and not s.normalize_lr_cov
        and is_bound(s.factor_bound)
        and all(type(p) is nn.Parameter for one in stack.layers for p in one.parameters)
        and not any(map(couples_decay, own))
    )


def _same(rate: float | Tensor, other: float | Tensor) -> bool:
    """Whether two rates are known to be the same without a wait for the device."""
    if isinstance(rate, Tensor) or isinstance(other, Tensor):
        return rate is other
    return rate == other


def _has_one_precision(layer: Layer) -> bool:
    """Whether weight and bias have one dtype, and nothing is kept in a wider one."""
    dtypes = {p.dtype for p in layer.parameters}
    wide = {torch.promote_types(d, torch.float32) for d in (*dtypes, *layer.dtypes)}
    return len(dtypes) == len(wide) == 1


def advance(bundle: Bundle, state: State, given: Gradients) -> Tensor:
    """Write the new factors, momenta and weights of a bundle.

    Returns:
        Whether all of it moved, 0-d. If products left the range of their dtype, their matrices do
        not move.
    """
    ok = given.ok
    assert ok is not None
    bundle.hold(state)
    s = given.settings(bundle.parameters[0])
    minus: Sequence[Tensor] = ()
    if bundle.learns:
        gradient = _gradients(bundle, given)
        if bundle.apart:
            minus = take_out_means(bundle, gradient, s, given)
        squares = bundle.matrices(gradient).norms().square()
        refresh(bundle, s, state, given, (gradient, squares))
        gradient = gradient.to(bundle.dtype)
    else:
        refresh(bundle, s, state, given)
        gradient = _gradients(bundle, given)
        squares = _squares(bundle, gradient, given)
    ahead = gradient
    if bundle.momentum is not None:
        # zeros in place of gradients, and 1 in place of α, change nothing
        like = bundle.factors.averages.k
        alpha = s.momentum if isinstance(s.momentum, Tensor) else constant(s.momentum, like)
        masked = dataclasses.replace(s, momentum=torch.where(ok, alpha, constant(1.0, like)))
        ahead, _ = averaged(gradient, bundle.momentum, masked, donate=True, out=gradient)
    made = [precondition(part.stack, s) for part in bundle.parts]

    def solve(matrices: Matrices) -> Matrices:
        weights, biases = matrices[: len(made)], matrices[len(made) :]
        columns = [own.left(bias) for own, bias in zip(made, biases, strict=False)]
        own, owned = zip(made, weights, strict=True), ahead is gradient
        return Matrices([*(by_pieces(P, owned, matrix) for P, matrix in own), *columns])

    late = None if bundle.sums is None else bundle.sums.late
    size = bundle.size if s.depth == 1.0 else bundle.size * s.depth
    found = sized(s, bundle.matrices(ahead), solve, size, squares, late)
    natural, columns = found.natural[: len(made)], found.natural[len(made) :]
    moves = ok & (found.length < math.inf)
    of_weights = moves[: bundle.several]
    if bundle.apart:  # a weight moves with its bias
        first = of_weights[: len(moves) - bundle.several]
        first &= moves[bundle.several :]
        moves = torch.cat([of_weights, first])
    scale = found.scale * moves  # NaN stays until the weights are changed
    if found.late is not None and bundle.sums is not None:
        bundle.sums.write(found.late, moves)
    for i, stack in enumerate(bundle.stacks):
        if stack.report is not None:
            told = {"agreement": found.agreement, "update": s.lr * (scale * found.length)}
            stack.report |= {name: bundle.joint.of(i, values) for name, values in told.items()}
    measure(bundle, s, natural, of_weights)
    everything: Tensor = of_weights.all()
    room, dtype = gradient, bundle.parameters[0].dtype
    if room.element_size() < dtype.itemsize:  # of momenta that are kept in fewer bits than weights
        room = torch.empty_like(room, dtype=dtype)
    if bundle.apart:
        rates = scale * (-1.0 * s.lr)
        steps = steps_of_biases(bundle, natural, columns, minus, rates)
        bundle.of_biases(room).copy_(steps)
    _move(bundle, natural, scale, room, given, everything, state)
    return everything


def _gradients(bundle: Bundle, given: Gradients) -> Tensor:
    """The gradients of all parameters in one array of their own, or zeros unless ok.

    They are in the dtype of the momenta. If the factors learn from them, they keep their own
    precision, with the range of float32.
    """
    flat = torch.cat([given.raw(p).reshape(-1) for p in bundle.parameters])
    flat = ranged(flat) if bundle.learns else flat.to(bundle.dtype)
    if given.scales.grads is not None:
        flat.div_(given.scales.grads)
    assert given.bad is not None
    return flat.masked_fill_(given.bad, 0.0)


def _squares(bundle: Bundle, flat: Tensor, given: Gradients) -> Tensor:
    """‖∇W‖² of each matrix."""
    like = bundle.factors.averages.k
    zero = constant(0.0, like)
    simple = [part.stack for part in bundle.parts if not part.stack.groups]
    weights, biases = (
        [p for stack in simple for layer in stack.layers for p in layer.parameters[k : k + 1]]
        for k in (0, 1)
    )
    squares = [
        squares_of(part.stack.layers[0].kind, part.joined(flat)).reshape(-1)
        for part in bundle.parts
        if part.stack.groups
    ]
    if weights:
        norms = torch.stack([given.norms.get(p, zero) for p in weights + biases]).to(like)
        each = norms * norms
        own = each[: len(weights)]
        own[: len(biases)].add_(each[len(weights) :])
        squares.insert(0, own)
    return torch.cat(squares) if len(squares) > 1 else squares[0]


def _move(
    bundle: Bundle,
    natural: Sequence[Tensor],
    scale: Tensor,
    room: Tensor,
    given: Gradients,
    moves: Tensor,
    state: State,
) -> None:
    """Change the weights and biases; the changes are written to the `room` of gradients.

    The changes of biases that are apart are there.
    """
    rates: dict[int, Tensor] = {}
    for i, (part, n) in enumerate(zip(bundle.parts, natural, strict=True)):
        layer = part.stack.layers[0]
        for k, out in enumerate(part.joined(room)[: 1 if part.stack.is_apart else None]):
            own = given.settings(layer.parameters[k])
            if id(own) not in rates:
                rates[id(own)] = scale * (-1.0 * own.lr)
            c = bundle.joint.of(i, rates[id(own)])
            if part.stack.groups:  # a weight has several
                out.copy_(layer.split(n * spread(c, n))[k])
            else:
                u = layer.split(n)[k]
                torch.mul(u, spread(c, u), out=out)
    # where products are infinite, zero times them is NaN
    room = room.nan_to_num_(0.0, 0.0, 0.0)
    first = bundle.parameters[0]
    if is_rounded(given.settings(first).rounding, [first.dtype]):
        _store(bundle, room, given, moves, state)
        return
    each = zip(bundle.parameters, torch.split(room.to(first.dtype), bundle.sizes), strict=True)
    # others may have been frozen since
    moving = [(p, change.view(p.shape)) for p, change in each if p.grad is not None]
    if moving:
        weights, changes = map(list, zip(*moving, strict=True))
        _decay(weights, weights, given, moves)
        torch._foreach_add_(weights, changes)


def _store(bundle: Bundle, room: Tensor, given: Gradients, moves: Tensor, state: State) -> None:
    """Change weights and biases of 16 bits, computed in float32."""
    wide = torch.cat([p.reshape(-1) for p in bundle.parameters]).float()
    each = torch.split(wide, bundle.sizes)
    _decay(bundle.parameters, each, given, moves)
    wide += room
    for p, own in zip(bundle.parameters, each, strict=True):
        if p.grad is None:  # it may have been frozen since
            own.copy_(p.reshape(-1))
    s, step = given.settings(bundle.parameters[0]), bundle.stacks[0].layers[0].group["steps"]
    bundle.row.write(wide, s, step, compensations(bundle.parameters, s, state), moves)


def _decay(
    parameters: Sequence[nn.Parameter], weights: Sequence[Tensor], given: Gradients, moves: Tensor
) -> None:
    """Shrink the weights of parameters that have a decay apart from the gradient."""
    alike: dict[int, tuple[StepSettings, list[Tensor]]] = {}
    for p, weight in zip(parameters, weights, strict=True):
        s = given.settings(p)
        if decouples_decay(s):
            alike.setdefault(id(s), (s, []))[1].append(weight)
    for s, some in alike.values():
        share = zero_unless(moves.to(widen(some[0][:0]).dtype), s.lr * s.weight_decay)
        torch._foreach_mul_(some, 1.0 - share)
