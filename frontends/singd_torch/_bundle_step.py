"""One step of a bundle: as `_step` has it for one stack, with operations for all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import is_half
from singd_core._settings import Settings, gap, is_bound, rate_of_factors
from singd_core.step import averaged, couples_decay, decouples_decay, scaled, squares_of
from singd_core.structures import Structure
from singd_core.updates.inverse_free import InverseFree, bounded, direction, stepped, weights
from singd_core.updates.natural import Preconditioner, balance
from singd_torch._bundle import Bundle, Part
from singd_torch._pieces import placed
from singd_torch._stacks import Stack, State
from singd_torch._step import Gradients, by_pieces


def steps_so(stack: Stack, given: Gradients) -> bool:
    """Whether a stack can step in a bundle: under the rule of the default, and as it is."""
    layer, factors = stack.layers[0], stack.factors
    s = given.settings(layer.weight)
    return (
        stack.compile is None
        and type(factors) is InverseFree
        and layer.weight.numel() > 0
        and s.normalized
        and s.kfac_like
        and not s.normalize_lr_cov
        and is_bound(s.factor_bound)
        and all(type(p) is nn.Parameter for one in stack.layers for p in one.parameters)
        and not any(couples_decay(given.settings(p)) for p in layer.parameters)
    )


def advance(bundle: Bundle, state: State, given: Gradients) -> Tensor:
    """Write the new factors, momenta and weights of a bundle.

    Returns:
        Whether all of it moved, 0-d. Matrices of which products left the range of their dtype do
        not move, and nothing but their momenta has changed then.
    """
    ok = given.ok
    assert ok is not None
    bundle.hold(state)
    s = given.settings(bundle.parameters[0])
    _refresh(bundle, s, state, given)
    gradient, squares = _gradients(bundle, ok, given)
    ahead = gradient
    if bundle.momentum is not None:
        # zeros in place of gradients, and 1 in place of α, change nothing
        alpha = placed(s.momentum, bundle.averages.k.dtype, ok.device)
        masked = dataclasses.replace(s, momentum=torch.where(ok, alpha, 1.0))
        ahead, _ = averaged(gradient, bundle.momentum, masked, donate=True, out=gradient)
    matrices = [part.stack.layers[0].kind.matrix(*part.joined(ahead)) for part in bundle.parts]
    length = _norms(matrices)
    natural = [
        by_pieces(_precondition(part.stack, s), ahead is gradient, matrix)
        for part, matrix in zip(bundle.parts, matrices, strict=True)
    ]
    lengths = length, _norms(natural)
    t_U = bundle.averages.t_U
    scale, late, agreement = scaled(s, bundle.sides, t_U, squares, lengths, bundle.late)
    moves = ok & (lengths[1] < math.inf)
    scale = scale * moves  # NaN stays until the weights are changed
    if late is not None and bundle.late is not None:
        bundle.late.map(lambda old, new: torch.where(moves, new, old, out=old), late)
    for part in bundle.parts:
        if part.stack.report is not None:
            update = s.lr * (scale * lengths[1])
            part.stack.report |= {"agreement": part.of(agreement), "update": part.of(update)}
    everything = moves.all()
    _move(bundle, natural, scale, gradient, given, everything)
    return everything


def _gradients(bundle: Bundle, ok: Tensor, given: Gradients) -> tuple[Tensor, Tensor]:
    """The gradients of all parameters, or zeros unless ok; and ‖∇W‖² of each matrix.

    The gradients are in one array of their own, in the dtype of the momenta.
    """
    flat = torch.cat([given.raw(p).reshape(-1) for p in bundle.parameters]).to(bundle.dtype)
    if given.scales.grads is not None:
        flat.div_(given.scales.grads)
    flat.masked_fill_(~ok, 0.0)
    like = bundle.averages.k
    zero = like.new_zeros(())
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
    return flat, torch.cat(squares)


def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """The Frobenius norms of matrices, or of stacks of them, in a row."""
    each = [m for own in matrices for m in own.reshape(-1, *own.shape[-2:]).unbind(0)]
    dtype = torch.float32 if is_half(each[0]) else None
    return torch.stack(torch._foreach_norm(each, 2, dtype))


def _move(
    bundle: Bundle,
    natural: Sequence[Tensor],
    scale: Tensor,
    room: Tensor,
    given: Gradients,
    everything: Tensor,
) -> None:
    """Change the weights and biases; the changes are written to the `room` of gradients."""
    rates: dict[int, Tensor] = {}
    for part, n in zip(bundle.parts, natural, strict=True):
        layer = part.stack.layers[0]
        for k, out in enumerate(part.joined(room)):
            own = given.settings(layer.parameters[k])
            if id(own) not in rates:
                rates[id(own)] = scale * (-1.0 * own.lr)
            c = part.of(rates[id(own)])
            if part.stack.groups:  # of which a weight has several
                out.copy_(layer.split(n * _spread(c, n))[k])
            else:
                u = layer.split(n)[k]
                torch.mul(u, _spread(c, u), out=out)
    # where products are infinite, zero times them is NaN
    room = room.nan_to_num_(0.0, 0.0, 0.0).to(bundle.parameters[0].dtype)
    changes = torch.split(room, bundle.sizes)
    moving: dict[int, tuple[Settings, list[Tensor], list[Tensor]]] = {}
    for p, change in zip(bundle.parameters, changes, strict=True):
        if p.grad is not None:  # it may have been frozen since
            own = given.settings(p)
            _, weights, their = moving.setdefault(id(own), (own, [], []))
            weights.append(p)
            their.append(change.view(p.shape))
    for own, weights, their in moving.values():
        if decouples_decay(own):
            share = everything.to(scale) * (own.lr * own.weight_decay)
            torch._foreach_mul_(weights, 1.0 - share)
        torch._foreach_add_(weights, their)


def _refresh(bundle: Bundle, s: Settings, state: State, given: Gradients) -> None:
    """Write the factors that the pending rows make, of the stacks that have rows."""
    due = [part for part in bundle.parts if part.stack.layers[0].pending]
    if not due:
        return
    curvatures = [part.stack.curvature(given.scales.rows) for part in due]
    for part in due:
        for layer in part.stack.layers:  # its rows are as large as its factors
            layer.pending = {}
    old = bundle.averages
    if len(due) < len(bundle.parts):
        old = old.map(lambda a: torch.cat([a[part.numbers] for part in due]))
    t_U, t_G = (
        torch.cat([t.reshape(-1) for t in ts]).to(old.k)
        for ts in zip(*((own.t_U, own.t_G) for own in curvatures), strict=True)
    )
    rates = old.rates(t_U, t_G, rate_of_factors(due[0].stack.layers[0].group["steps"], s), s)
    places = list(_places(due))
    of_both = weights(rates, None, s)
    m = []
    for part, place, curvature in zip(due, places, curvatures, strict=True):
        own, grams = partial(_own, place, part), _factors(part.stack).grams(curvature)
        pairs = zip((curvature.H_K, curvature.H_C), grams, of_both, strict=True)
        m.append([direction(None, H, G, own(of_H), own(of_G), s) for H, G, (of_H, of_G) in pairs])
    norms = _sizes(*([pair[k] for pair in m] for k in (0, 1)))
    betas = bounded(rates.beta, norms, s).unbind()
    steps = [-1.0 * start * beta for start, beta in zip(rates.start, betas, strict=True)]
    assert given.ok is not None
    use = given.ok & (norms.sum(0) < math.inf)
    rows: list[Tensor] = []
    for part, place, pair in zip(due, places, m, strict=True):
        factors, own = _factors(part.stack), partial(_own, place, part)
        sides = zip((factors.K, factors.C), pair, rates.start, steps, strict=True)
        for L, along, start, step in sides:
            L_new = stepped(L, along, own(start), own(step), s)
            L.map(partial(_write, own(use)), L_new)
        part.stack.hold(factors, state, seen=True)
        rows += [factors.K.row_norms(), factors.C.row_norms()]
        if part.stack.report is not None:
            sizes = (own(rates.beta) * own(n) for n in norms)
            part.stack.report |= zip(("K_step", "C_step"), sizes, strict=True)
    scales = balance(torch.cat([own.reshape(-1) for own in rows]))
    each = [
        own.view(like.shape)
        for own, like in zip(torch.split(scales, [r.numel() for r in rows]), rows, strict=True)
    ]
    for i, part in enumerate(due):
        _precondition(part.stack, s, each[2 * i : 2 * i + 2])
    if old is bundle.averages:
        old.map(partial(_write, use), rates.averages)
        return
    for part, place in zip(due, places, strict=True):
        own = partial(_own, place, part)
        part.stack.averages.map(partial(_write, own(use)), rates.averages.map(own))


def _sizes(*rows: Sequence[Structure]) -> Tensor:
    """The Frobenius norms of rows of structured matrices, or of stacks of them."""
    return torch.cat([m.norm().reshape(-1) for row in rows for m in row]).view(len(rows), -1)


def _precondition(
    stack: Stack, s: Settings, scales: Sequence[Tensor] | None = None
) -> Preconditioner:
    """What preconditions until the next refresh."""
    if stack.preconditioner is None:
        own, steps = _factors(stack), gap(stack.layers[0].group["steps"], s)
        stack.preconditioner = own.preconditioner(steps, balanced=True, scales=scales)
    return stack.preconditioner


def _factors(stack: Stack) -> InverseFree:
    assert isinstance(stack.factors, InverseFree)
    return stack.factors


def _places(parts: Sequence[Part]) -> Iterator[slice]:
    """Where the numbers of each are, in a vector of those of these parts alone."""
    start = 0
    for part in parts:
        end = start + part.numbers.stop - part.numbers.start
        yield slice(start, end)
        start = end


def _own(place: slice, part: Part, numbers: Any) -> Any:
    """The numbers of one part, where all have their own."""
    several = isinstance(numbers, Tensor) and numbers.ndim
    return numbers[place].view(part.batch) if several else numbers


def _write(keep: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Write what is new where it is to be kept, of matrices along the first axes."""
    if old.numel():
        torch.where(_spread(keep, old), new, old, out=old)
    return old


def _spread(c: Tensor, like: Tensor) -> Tensor:
    """The numbers of matrices along the first axes, with the axes that they lack."""
    return c.view(*c.shape, *(1,) * (like.ndim - c.ndim))
