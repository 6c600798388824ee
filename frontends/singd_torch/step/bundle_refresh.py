"""A refresh of the factors of a bundle: the numbers of all its matrices in vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from singd_core._settings import Settings, rate_of_factors
from singd_core.curvature import Curvature, shares
from singd_core.levels import scale
from singd_core.preconditioner import Preconditioner, balance
from singd_core.rules.base import kept
from singd_core.rules.inverse_free import InverseFree, bounded, direction, plain_weights, stepped
from singd_core.structures import Structure
from singd_core.structures.pattern import Pattern
from singd_torch.step.bundle import Bundle, Part, norms_of
from singd_torch.step.stack import Stack, State
from singd_torch.step.stack_step import Gradients
from singd_torch.tensors.pieces import narrowed
from singd_torch.tensors.select import spread


def refresh(bundle: Bundle, s: Settings, state: State, given: Gradients) -> None:
    """Write the factors that the pending rows make, of the stacks that have rows."""
    due = [part for part in bundle.parts if part.stack.layers[0].pending]
    if not due:
        return
    curvatures = _curvatures(due, given.scales.rows)
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
    of_both = plain_weights(rates)
    m = []
    for part, place, curvature in zip(due, places, curvatures, strict=True):
        own, grams = partial(_own, place, part), _factors(part.stack).grams(curvature)
        pairs = zip((curvature.H_K, curvature.H_C), grams, of_both, strict=True)
        m.append([direction(None, H, G, own(of_H), own(of_G), s) for H, G, (of_H, of_G) in pairs])
    counts = [place.stop - place.start for place in places]
    norms = _sizes([[pair[k] for pair in m] for k in (0, 1)], counts)
    betas = bounded(rates.beta, norms, s).unbind()
    steps = [-1.0 * start * beta for start, beta in zip(rates.start, betas, strict=True)]
    assert given.ok is not None
    use = given.ok & (norms.sum(0) < math.inf)
    rows: list[Tensor] = []
    for part, place, pair in zip(due, places, m, strict=True):
        factors, own = _factors(part.stack), partial(_own, place, part)
        rounding = part.stack.rounding(s)
        sides = zip("KC", (factors.K, factors.C), pair, rates.start, steps, strict=True)
        for name, L, along, start, step in sides:
            L_new = kept(stepped(L, along, own(start), own(step), s), L, name, rounding)
            L.map(partial(_write, own(use)), L_new)
        part.stack.hold(factors, state, seen=True)
        rows += [factors.K.row_norms(), factors.C.row_norms()]
        if part.stack.report is not None:
            sizes = (own(rates.beta) * own(n) for n in norms)
            part.stack.report |= zip(("K_step", "C_step"), sizes, strict=True)
    scales = balance(_flat(rows))
    if bundle.levels is not None:
        known = bundle.levels
        if len(due) < len(bundle.parts):
            known = torch.cat([known[side] for part in due for side in part.sides])
        scales = scales * scale(known)
    each = [
        own.view(like.shape)
        for own, like in zip(torch.split(scales, [r.numel() for r in rows]), rows, strict=True)
    ]
    for i, part in enumerate(due):
        precondition(part.stack, s, each[2 * i : 2 * i + 2])
    if old is bundle.averages:
        old.map(partial(_write, use), rates.averages)
    else:
        for part, place in zip(due, places, strict=True):
            own = partial(_own, place, part)
            part.stack.averages.map(partial(_write, own(use)), rates.averages.map(own))
    bundle.measured()


def precondition(
    stack: Stack, s: Settings, scales: Sequence[Tensor] | None = None
) -> Preconditioner:
    """What preconditions until the next refresh."""
    if stack.preconditioner is None:
        made = _factors(stack).preconditioner(stack.uses(s), balanced=True, scales=scales)
        if stack.autocast:
            K, C = (dataclasses.replace(side, L=narrowed(side.L)) for side in (made.K, made.C))
            made = Preconditioner(K, C)
        return stack.precondition_with(made)
    return stack.preconditioner


def _curvatures(parts: Sequence[Part], grad_scale: Any) -> list[Curvature]:
    """The curvature of each part; sums are divided together, where the host knows by what."""
    found: list[Curvature] = []
    known: dict[int, list[float]] = {}
    for i, part in enumerate(parts):
        pending = part.stack.pending()
        (of_part, _), rows = next(iter(pending.items()))
        inputs, N, outputs, M = rows.terms(grad_scale)
        if (
            len(pending) > 1
            or of_part is not None
            or isinstance(N, Tensor)
            or isinstance(M, Tensor)
        ):
            found.append(part.stack.curvature(grad_scale))
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


def _sizes(rows: Sequence[Sequence[Structure]], counts: Sequence[int]) -> Tensor:
    """The Frobenius norms of rows of structured matrices, so many in each of a row."""
    each: list[Tensor] = []
    more: list[Tensor] = []  # the further arrays of patterns, and where their matrices begin
    starts: list[int] = []
    for m, n in ((m, n) for row in rows for m, n in zip(row, counts, strict=True)):
        arrays = [a for _, a in m.named_arrays() if a.numel()] if isinstance(m, Pattern) else []
        first, *others = arrays or [m.norm()]
        starts += [len(each) + i for _ in others for i in range(n)]
        each += first.reshape(n, -1).unbind(0)
        more += [part for a in others for part in a.reshape(n, -1).unbind(0)]
    norms = norms_of(each + more)
    if more:
        squares = norms * norms
        norms, place = squares[: len(each)], len(each)
        for start, n in _runs(starts):
            norms[start : start + n].add_(squares[place : place + n])
            place += n
        norms.sqrt_()
    return norms.view(len(rows), -1)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The beginnings and lengths of what counts up."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


def _factors(stack: Stack) -> InverseFree:
    assert isinstance(stack.factors, InverseFree)
    return stack.factors


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


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
        torch.where(spread(keep, old), new, old, out=old)
    return old
