"""Steps of layers in the parts in which their weights are, for which no gradient is sent.

The factor along the axis that is parted is diagonal: then each row of ∇W P_K, or each column of
P_C ∇W, is made of the same row or column of ∇W. All processes have the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singd_core._settings import Settings, is_due, rate_of_factors
from singd_core.levels import FLOOR, sums, weight_of
from singd_core.preconditioner import Preconditioner, Side
from singd_core.rounding import Place
from singd_core.rules import Factors
from singd_core.step import Direction, Late, averaged, scaled, sides, size
from singd_torch.layers.layer import Layer
from singd_torch.sharding.local import ALL, Part
from singd_torch.step.stack import Stack, State
from singd_torch.step.stack_step import Gradients, by_pieces, masked, move, refreshed
from singd_torch.tensors.pieces import placed
from singd_torch.tensors.select import either

Total: TypeAlias = Callable[[Tensor], Tensor]


@dataclasses.dataclass(eq=False)
class Slab(Layer):
    """Some rows or columns of the matrix of a layer, whose factors are those of all of it.

    Attributes:
        whole: The shape of all of the weight.
        part: Which rows or columns.
        places: Where the parts of the weight and of the bias stand in all of these.
    """

    whole: tuple[int, ...] = ()
    part: Part = ALL
    places: tuple[Place, ...] = ()

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """That of all of the matrix."""
        return self.kind.shape(self.whole, self.bias is not None)

    def own(self, preconditioner: Preconditioner) -> Preconditioner:
        """What of a preconditioner acts on these rows or columns."""
        if self.part.is_rows:
            return preconditioner.rows(self.part.j)
        K, scale = preconditioner.K, preconditioner.K.scale
        K = Side(K.L.part(self.part.j), K.whole, None if scale is None else scale[self.part.j])
        return dataclasses.replace(preconditioner, K=K)


@dataclasses.dataclass(frozen=True, eq=False)
class _Begun:
    """A slab in a step: its new factors, its natural gradient, and squares of which all are summed.

    Those are the squares of the gradient, of the average of gradients, and of its natural gradient.
    """

    slab: Slab
    stack: Stack
    s: Settings
    factors: Factors
    preconditioner: Preconditioner
    natural: Tensor
    squares: Tensor


def advance(
    stacks: Sequence[Stack], state: State, given: Gradients, total: Total, wide: torch.dtype
) -> list[Any]:
    """Write the new factors, momenta and weights of slabs, each in a stack of its own.

    Args:
        stacks: The same on all processes.
        state: The state.
        given: The gradients.
        total: The sum of a tensor over all processes.
        wide: The dtype of squares.

    Returns:
        What `stack_step.advance` returns of each.
    """
    if not stacks:
        return []
    begun = [_begin(stack, state, given, wide) for stack in stacks]
    squares = total(torch.stack([one.squares for one in begun]))
    alike: dict[int, list[int]] = {}
    for i, one in enumerate(begun):
        alike.setdefault(id(one.slab.group), []).append(i)
    moves: dict[int, Any] = {}
    for places in alike.values():
        some = [begun[i] for i in places]
        moves |= zip(places, _move(some, squares[places], state, given), strict=True)
    _level([(one, moves[i]) for i, one in enumerate(begun) if moves[i] is not False], total)
    return [moves[i] for i in range(len(begun))]


def _begin(stack: Stack, state: State, given: Gradients, wide: torch.dtype) -> _Begun:
    """Its natural gradient; the momentum is written, as it is of gradients that are finite."""
    slab, ok = stack.layers[0], given.ok
    assert isinstance(slab, Slab)
    s = given.settings(slab.weight)
    gradient = stack.joined(given.of)
    factors, preconditioner = refreshed(stack, s, given.scales, gradient, stack.rounding(s))
    assert preconditioner is not None  # nothing is compiled
    if stack.momenta is None and s.momentum != 0.0:
        stack.begin(state, s)
    if ok is not None:
        s = masked(s, ok, gradient[0])
        gradient = [torch.where(ok, g, 0.0) for g in gradient]  # NaN times 0 is NaN
    ahead = gradient
    if stack.momenta is not None:
        pairs = zip(gradient, stack.momenta, strict=True)
        ahead = [averaged(g, m, s, donate=True)[0] for g, m in pairs]
    matrix = slab.kind.matrix(*ahead)
    before = torch.linalg.vector_norm(matrix, dtype=wide)
    owned = s.nesterov and stack.momenta is not None  # an average of its own
    natural = by_pieces(slab.own(preconditioner), owned, matrix)
    after = torch.linalg.vector_norm(natural, dtype=wide)
    trained = [p for p in slab.parameters if p.grad is not None]
    norms = torch.stack([placed(given.norms[p], wide, before.device) for p in trained])
    squares = torch.stack([norms.square().sum(), before.square(), after.square()])
    return _Begun(slab, stack, s, factors, preconditioner, natural, squares / slab.part.copies)


def _move(some: Sequence[_Begun], squares: Tensor, state: State, given: Gradients) -> Sequence[Any]:
    """Move slabs of one group, by the squares of all processes."""
    of_gradient, ahead, natural = squares.unbind(1)
    on_device = partial(placed, dtype=squares.dtype, device=squares.device)
    late = _joined([one.stack.late for one in some if one.stack.late is not None])
    t_U = torch.stack([one.factors.averages.t_U for one in some])
    each = zip(*(_sides(one.slab) for one in some), strict=True)
    spectral, outputs = (torch.stack([on_device(x) for x in side]) for side in each)
    lengths = ahead.sqrt(), natural.sqrt()
    of_steps = size((spectral, outputs), t_U)
    scale, late, agreement = scaled(some[0].s, of_steps, of_gradient, lengths, late)
    scales, agreements = (on_device(x).expand_as(natural) for x in (scale, agreement))
    finite = natural.isfinite()
    moves = finite.tolist() if given.ok is None else (given.ok & finite).unbind()
    for i, (one, moves_one) in enumerate(zip(some, moves, strict=True)):
        if moves_one is False:  # of the host
            continue
        if one.stack.report is not None:
            update = one.s.lr * scales[i] * lengths[1][i]
            one.stack.report |= {"agreement": agreements[i], "update": update}
        own = None if late is None else late.map(lambda numbers, i=i: numbers[i])
        _write(one, scales[i], own, moves_one, state, given)
    return moves


def _sides(slab: Slab) -> tuple[float, float]:
    _, d_out, d_in = slab.shape
    return sides(d_out, d_in, slab.kind.overlap)


def _joined(late: Sequence[Late]) -> Late | None:
    if not late:
        return None
    return late[0].map(lambda *numbers: torch.stack(numbers), *late[1:])


def _write(
    one: _Begun, scale: Tensor, late: Late | None, moves: Any, state: State, given: Gradients
) -> None:
    """Write what is new of a slab, unless an accelerator knows that it does not move."""
    stack, slab, factors, natural = one.stack, one.slab, one.factors, one.natural
    on_host = given.ok is None
    if not on_host:
        scale, natural = torch.where(moves, scale, 0.0), torch.where(moves, natural, 0.0)
        if factors is not stack.factors:
            factors = factors.map(partial(either, moves), stack.factors)  # type: ignore[arg-type]
    if stack.momenta is not None and late is not None and stack.late is not None:
        if not on_host:
            late = late.map(partial(either, moves), stack.late)
        stack.hold_momenta(stack.momenta, late, state)
    if factors is not stack.factors:
        known = one.preconditioner if on_host else None
        stack.hold(factors, state, seen=True, preconditioner=known)
    parts = slab.split(natural)
    found = Direction(parts, scale.item() if on_host else scale, True, None, None)
    settings = [given.settings(p) for p in slab.parameters]
    rounding = stack.rounding(settings[0])
    move(stack, found, settings, None if on_host else moves, rounding, state, slab.places)


def _level(moved: Sequence[tuple[_Begun, Any]], total: Total) -> None:
    """Tell factors of natural gradients, if the next step makes anew what preconditions."""
    asked, flats = [], []
    for one, moves in moved:
        levels, steps = one.stack.factors.levels, one.slab.group["steps"] + 1  # type: ignore[union-attr]
        if levels is None or not is_due(steps, one.s):
            continue
        j, sides = one.slab.part.j, [levels.rows + FLOOR, levels.columns + FLOOR]
        own = 0 if one.slab.part.is_rows else 1
        sides[own] = sides[own][j]
        found = list(sums(one.natural, *sides))
        place = torch.zeros_like(levels.rows if own == 0 else levels.columns)
        place[j] = found[own]
        found[own] = place
        flats.append(torch.cat(found) / one.slab.part.copies)
        asked.append((one, moves, levels, rate_of_factors(steps, one.s)))
    if not asked:
        return
    parts = torch.split(total(torch.cat(flats)), [flat.numel() for flat in flats])
    for (one, moves, levels, rate), flat in zip(asked, parts, strict=True):
        rows, columns = torch.split(flat, [levels.rows.numel(), levels.columns.numel()])
        weight = weight_of(one.stack.averages.k, rate)
        new = levels.updated(rows, columns, weight)
        if isinstance(moves, Tensor):
            new = new.map(partial(either, moves), levels)
        levels.map(Tensor.copy_, new)
        one.stack.preconditioner = None
