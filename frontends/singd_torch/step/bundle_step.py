"""One step of a bundle: as in `stack_step` for one stack, with one operation for all stacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import ranged, widen
from singd_core._settings import StepSettings, is_bound
from singd_core.length import sized
from singd_core.rounding import is_rounded
from singd_core.rules import IKFAC, Shampoo, inputs_of
from singd_core.step import averaged, couples_decay, decouples_decay, squares_of
from singd_torch.layers.layer import Layer
from singd_torch.step.begun import Gradients, same, zero_unless
from singd_torch.step.bundle import Bundle
from singd_torch.step.bundle_centering import steps_of_biases, take_out_means
from singd_torch.step.bundle_refresh import precondition, refresh
from singd_torch.step.levels import measure
from singd_torch.step.rounding import compensations
from singd_torch.step.solve import by_pieces
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.matrices import Matrices
from singd_torch.tensors.pieces import placed
from singd_torch.tensors.scratch import constant
from singd_torch.tensors.select import spread


def steps_so(stack: Stack, given: Gradients) -> bool:
    """Whether a stack can step in a bundle: under the rule of the default, and as it is."""
    layer, factors = stack.layers[0], stack.factors
    own = [given.settings(p) for one in stack.of_groups for p in one.parameters]
    s = own[0]
    if type(factors) is Shampoo:
        # rows that have come make factors of another rule; a bias of another rate steps with a mean
        of_bias = given.settings(layer.parameters[-1])
        alike = inputs_of(factors) is None or same(of_bias.lr, s.lr)
        fits = alike and not layer.pending
    else:
        fits = type(factors) is IKFAC
    return (
        stack.compile is None
        and not stack.shares_memory
        and fits
        and _has_one_precision(layer)
        and layer.weight.numel() > 0
        and s.normalized
        and not s.normalize_lr_cov
        and is_bound(s.factor_bound)
        and all(type(p) is nn.Parameter for one in stack.layers for p in one.parameters)
        and not any(map(couples_decay, own))
    )


def _has_one_precision(layer: Layer) -> bool:
    """Whether weight and bias have one dtype, and nothing is kept in a wider one."""
    dtypes = {p.dtype for p in layer.parameters}
    wide = {torch.promote_types(d, torch.float32) for d in (*dtypes, *layer.dtypes)}
    return len(dtypes) == len(wide) == 1


def advance(bundle: Bundle, state: State, given: Gradients) -> list[tuple[Sequence[Stack], Any]]:
    """Write the new factors, momenta and weights of a bundle.

    Returns:
        Stacks, and whether all of them moved: bools, or one that is 0-d on an accelerator. If
        products left the range of their dtype, their matrices do not move.
    """
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
        how = s
        if given.ok is not None:
            like = bundle.factors.averages.k
            alpha = s.momentum if isinstance(s.momentum, Tensor) else constant(s.momentum, like)
            alpha = torch.where(given.ok, alpha, constant(1.0, like))
            how = dataclasses.replace(s, momentum=alpha)
        ahead, _ = averaged(gradient, bundle.momentum, how, donate=True, out=gradient)
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
    moves = given.allows(found.length < math.inf)
    of_weights = moves[: bundle.several]
    if bundle.apart:  # a weight moves with its bias
        first = of_weights[: len(moves) - bundle.several]
        first &= moves[bundle.several :]
        moves = torch.cat([of_weights, first])
    scale = found.scale * moves  # NaN stays until the weights are changed
    if found.late is not None and bundle.sums is not None:
        bundle.sums.write(found.late, moves)
    rates = [_rates(bundle, given, k) for k in (0, 1)]
    for i, stack in enumerate(bundle.stacks):
        if stack.report is not None:
            lengths = rates[0] * (scale * found.length)[: bundle.several]
            told = {"agreement": found.agreement, "update": lengths}
            stack.report |= {name: bundle.joint.of(i, values) for name, values in told.items()}
    measure(bundle, s, natural, of_weights)
    everything: Tensor = of_weights.all()
    room, dtype = gradient, bundle.parameters[0].dtype
    if room.element_size() < dtype.itemsize:  # of momenta that are kept in fewer bits than weights
        room = torch.empty_like(room, dtype=dtype)
    if bundle.apart:
        steps = steps_of_biases(bundle, natural, columns, minus, scale)
        bundle.of_biases(room).copy_(steps * (-1.0 * _of_biases(bundle, rates[0])))
    if same(*rates):
        changes = [scale * (-1.0 * rates[0])] * 2
    else:
        changes = [scale[: bundle.several] * (-1.0 * rate) for rate in rates]
    if given.ok is not None:
        _move(bundle, natural, changes, room, given, everything, state, ())
        return [(bundle.stacks, everything)]
    each: list[tuple[Sequence[Stack], Any]] = [(bundle.stacks, True)]
    if not everything:
        stacks = enumerate(bundle.stacks)
        each = [([one], bool(bundle.joint.of(i, of_weights).all())) for i, one in stacks]
    still = [stack for stacks, moved in each if not moved for stack in stacks]
    _move(bundle, natural, changes, room, given, torch.ones_like(everything), state, still)
    return each


def _gradients(bundle: Bundle, given: Gradients) -> Tensor:
    """The gradients of all parameters in one array of their own, or zeros unless ok.

    They are in the dtype of the momenta. If the factors learn from them, they keep their own
    precision, with the range of float32.
    """
    flat = torch.cat([given.raw(p).reshape(-1) for p in bundle.parameters])
    flat = ranged(flat) if bundle.learns else flat.to(bundle.dtype)
    if given.scales.grads is not None:
        flat.div_(given.scales.grads)
    return flat if given.bad is None else flat.masked_fill_(given.bad, 0.0)


def _squares(bundle: Bundle, flat: Tensor, given: Gradients) -> Tensor:
    """‖∇W‖² of each matrix."""
    like = bundle.factors.averages.k
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
        each = _row([given.norms.get(p, 0.0) for p in weights + biases], like).square()
        own = each[: len(weights)]
        own[: len(biases)].add_(each[len(weights) :])
        squares.insert(0, own)
    return torch.cat(squares) if len(squares) > 1 else squares[0]


def _rates(bundle: Bundle, given: Gradients, k: int) -> Any:
    """The rates of all weights, or with k = 1 of biases: one for all if they are known to be equal.

    Else they are in a row, with the rates of weights that have no bias.
    """
    layers = [layer for stack in bundle.stacks for layer in stack.layers]
    rates = [given.settings(layer.parameters[: k + 1][-1]).lr for layer in layers]
    if all(same(rate, rates[0]) for rate in rates):
        return rates[0]
    like = bundle.factors.averages.k
    counts = [math.prod(layer.shape[0]) for layer in layers]
    if not any(isinstance(rate, Tensor) for rate in rates):
        row = [rate for rate, n in zip(rates, counts, strict=True) for _ in range(n)]
        return torch.tensor(row, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)
    each = zip(rates, counts, strict=True)
    return torch.cat([placed(rate, like.dtype, like.device).expand(n) for rate, n in each])


def _of_biases(bundle: Bundle, rates: Any) -> Any:
    """The rates of weights for each number of the biases that are apart."""
    if not (isinstance(rates, Tensor) and rates.ndim):
        return rates
    return bundle.joint.C.on_rows(rates[: len(bundle.size) - bundle.several])


def _row(norms: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers in a row; on an accelerator each is 0-d, or 0."""
    if not any(isinstance(norm, Tensor) for norm in norms):
        return like.new_tensor(norms)
    zero = constant(0.0, like)
    each = [norm if isinstance(norm, Tensor) else zero for norm in norms]
    return torch.stack(each).to(like)


def _move(
    bundle: Bundle,
    natural: Sequence[Tensor],
    changes: Sequence[Tensor],
    room: Tensor,
    given: Gradients,
    moves: Tensor,
    state: State,
    still: Sequence[Stack],
) -> None:
    """Change the weights and biases, by these multiples of natural gradients.

    What they change by is written to the `room` of gradients; there it is of biases that are apart.
    `moves` tells whether any decay, or are stored in 16 bits. `still` are stacks that do not.
    """
    # others may have been frozen since
    moving = {p for p in bundle.parameters if p.grad is not None}
    moving -= {p for stack in still for layer in stack.layers for p in layer.parameters}
    for i, (part, n) in enumerate(zip(bundle.parts, natural, strict=True)):
        layer = part.stack.layers[0]
        for k, out in enumerate(part.joined(room)[: 1 if part.stack.is_apart else None]):
            c = bundle.joint.of(i, changes[k])
            if part.stack.groups:  # a weight has several
                out.copy_(layer.split(n * spread(c, n))[k])
            else:
                u = layer.split(n)[k]
                torch.mul(u, spread(c, u), out=out)
    # where products are infinite, zero times them is NaN
    room = room.nan_to_num_(0.0, 0.0, 0.0)
    first = bundle.parameters[0]
    if is_rounded(given.settings(first).rounding, [first.dtype]):
        _store(bundle, room, given, moves, state, moving)
        return
    each = zip(bundle.parameters, torch.split(room.to(first.dtype), bundle.sizes), strict=True)
    # others, such as weights in `channels_last`, would make CUDA add one pair after the other
    alike: dict[bool, list[tuple[nn.Parameter, Tensor]]] = {}
    for p, change in each:
        if p in moving:
            alike.setdefault(p.is_contiguous(), []).append((p, change.view(p.shape)))
    for pairs in alike.values():
        weights, steps = map(list, zip(*pairs, strict=True))
        _decay(weights, weights, given, moves)
        torch._foreach_add_(weights, steps)


def _store(
    bundle: Bundle,
    room: Tensor,
    given: Gradients,
    moves: Tensor,
    state: State,
    moving: Container[nn.Parameter],
) -> None:
    """Change weights and biases of 16 bits, computed in float32; those that are `moving`."""
    wide = torch.cat([p.reshape(-1) for p in bundle.parameters]).float()
    each = torch.split(wide, bundle.sizes)
    _decay(bundle.parameters, each, given, moves)
    wide += room
    for p, own in zip(bundle.parameters, each, strict=True):
        if p not in moving:
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
