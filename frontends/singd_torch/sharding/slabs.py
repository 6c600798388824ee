"""Steps of layers in the parts in which their weights are, for which no gradient is sent.

The factor along the axis that is parted is diagonal: then each row of ∇W P_K, or each column of
P_C ∇W, is made of the same row or column of ∇W. All processes have the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from singd_core._settings import StepSettings
from singd_core.curvature import Curvature
from singd_core.late import Late
from singd_core.length import scaled, sides, size
from singd_core.preconditioner import Preconditioner
from singd_core.rules import Factors, Shampoo, inputs_of
from singd_core.rules.centering import InputMean
from singd_core.step import Direction, averages, plus
from singd_core.without_mean import share_of_bias
from singd_torch.sharding import slab_centering
from singd_torch.sharding.slab import Slab
from singd_torch.sharding.slab_sums import Total, learned_of, level, slab_in, squares_of, totals
from singd_torch.step.begun import Gradients, begin, learns_now, masked, settled
from singd_torch.step.solve import by_pieces
from singd_torch.step.stack import Stack, State
from singd_torch.step.stack_step import move, rates
from singd_torch.tensors.join import in_a_row
from singd_torch.tensors.pieces import placed
from singd_torch.tensors.select import either


class _Apart(NamedTuple):
    """What a step has of a bias that is apart.

    Attributes:
        natural: Its natural gradient, as a column.
        moved: What the natural gradient of the weight is along the mean of the inputs.
        ratio: The rate of the weight in shares of its own.
    """

    natural: Tensor
    moved: Tensor
    ratio: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Begun:
    """A slab in a step: its new factors, its natural gradient, and squares that processes sum.

    Each matrix has the squares of the gradient, of the average of gradients, and of its natural
    gradient. Natural gradients are of blocks. A bias that is apart has such numbers beside the
    numbers of its weight.
    """

    slab: Slab
    stack: Stack
    s: StepSettings
    factors: Factors
    preconditioner: Preconditioner
    decay: Sequence[Tensor] | None
    natural: Sequence[Tensor]
    squares: Tensor
    apart: _Apart | None


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
    learning = [one for one in stacks if learns_now(one, given.settings(slab_in(one).weight))]
    means = slab_centering.told(learning, given, total)

    def gradient_of(stack: Stack) -> Sequence[Tensor]:
        gradient = stack.joined(given.of)
        if stack not in means:
            return gradient
        return slab_centering.centered(slab_in(stack), means[stack], gradient)

    learned = learned_of(learning, gradient_of, total)
    begun = [
        _begin(stack, state, given, learned.get(stack), means.get(stack), wide) for stack in stacks
    ]
    counts = [one.squares.shape[1] for one in begun]
    begun, of_all = _summed(begun, total, wide)
    squares = torch.split(of_all, counts, 1)
    alike: dict[int, list[int]] = {}
    for i, one in enumerate(begun):
        alike.setdefault(id(one.slab.group), []).append(i)
    moves: dict[int, Any] = {}
    for places in alike.values():
        some = [begun[i] for i in places]
        own = torch.cat([squares[i] for i in places], 1)
        moves |= zip(places, _move(some, own, state, given, total), strict=True)
    moved = ((one, moves[i]) for i, one in enumerate(begun) if moves[i] is not False)
    level([(one.stack, one.s, one.natural, how) for one, how in moved], total)
    return [moves[i] for i in range(len(begun))]


def _summed(
    begun: Sequence[_Begun], total: Total, wide: torch.dtype
) -> tuple[list[_Begun], Tensor]:
    """The squares of all processes, and what weights move along means where these have columns."""
    squares = torch.cat([one.squares for one in begun], 1)
    moved = {
        i: slab_centering.in_all_rows(one.slab, one.apart.moved, wide)
        for i, one in enumerate(begun)
        if one.apart is not None and one.slab.blocks[0].in_columns
    }
    of_all, *others = totals([squares, *moved.values()], total)
    found = list(begun)
    for i, all_rows in zip(moved, others, strict=True):
        one = begun[i]
        assert one.apart is not None
        own = all_rows[one.slab.blocks[0].rows, None].to(one.apart.moved.dtype)
        found[i] = dataclasses.replace(one, apart=one.apart._replace(moved=own))
    return found, of_all


def _begin(
    stack: Stack,
    state: State,
    given: Gradients,
    learned: Curvature | None,
    told: InputMean | None,
    wide: torch.dtype,
) -> _Begun:
    """Its natural gradient; a momentum of gradients is written, as those are finite."""
    slab = slab_in(stack)
    s, _, gradient, decay, factors, preconditioner = begin(stack, state, given, learned)
    assert preconditioner is not None  # nothing is compiled
    if isinstance(factors, Shampoo) and told is not None:
        factors = dataclasses.replace(factors, inputs=told)
    inputs, ratio = inputs_of(factors), None
    if inputs is not None:
        inputs, ratio = rates([given.settings(p) for p in slab.parameters], inputs, compiled=False)
    ahead = gradient
    if s.normalized:
        gradient = plus(gradient, decay)
        if inputs is not None:
            gradient = slab_centering.centered(slab, inputs, gradient)
        ahead, _ = averages(gradient, stack.momenta, s, donate=True)
    blocks = slab.joined(*ahead)
    of_gradient = before = None  # as nobody asks for them
    if s.normalized:
        changed = decay is not None or inputs is not None
        of_gradient = _squares_of_gradient(slab, given, gradient if changed else None, wide)
        before = squares_of(slab, blocks, wide)
    owned = s.normalized and s.nesterov and stack.momenta is not None  # an average of its own
    natural = _natural(slab, preconditioner, blocks, owned)
    after = squares_of(slab, natural, wide)
    squares = torch.stack([after if x is None else x for x in (of_gradient, before, after)])
    apart = None
    if inputs is not None:
        of_bias = slab_centering.column(slab, preconditioner, ahead[-1])
        columns = slab.column(gradient[-1]), slab.column(ahead[-1]), of_bias
        own = torch.stack([squares_of(slab, [x], wide, of_bias=True) for x in columns])
        squares = torch.stack([squares, own], -1).flatten(1)
        apart = _Apart(of_bias, slab_centering.along(slab, inputs, natural[0]), ratio)
    return _Begun(slab, stack, s, factors, preconditioner, decay, natural, squares, apart)


def _natural(
    slab: Slab, preconditioner: Preconditioner, blocks: Sequence[Tensor], owned: bool
) -> list[Tensor]:
    """The natural gradients of blocks, which may be overwritten if they are `owned`."""
    found = []
    for i, block in enumerate(blocks):
        pieces = [piece for piece in slab.pieces if piece.block == i]
        if len(pieces) == 1:
            (piece,) = pieces
            own = by_pieces(piece.preconditioner(preconditioner), owned, piece.view(block))
            found.append(own.flatten(0, -2))
            continue
        natural = torch.empty_like(block, dtype=preconditioner.C.L.like.dtype)
        for piece in pieces:
            own = by_pieces(piece.preconditioner(preconditioner), False, piece.view(block))
            piece.view(natural).copy_(own)
        found.append(natural)
    return found


def _squares_of_gradient(
    slab: Slab, given: Gradients, gradient: Sequence[Tensor] | None, wide: torch.dtype
) -> Tensor:
    """The squares of the gradient, from norms where these are known."""
    batch, _, _ = slab.shape
    if batch or gradient is not None:
        parts = gradient or [given.of(p) for p in slab.parameters]
        return squares_of(slab, slab.joined(*parts), wide)
    copies = [block.copies for block in slab.blocks]
    found = torch.zeros(1, dtype=wide, device=slab.weight.device)
    for p, n in zip(slab.parameters, (*copies, copies[-1]), strict=False):
        if p.grad is not None:
            found += placed(given.norms[p], wide, found.device).square() / n
    return found


def _move(
    some: Sequence[_Begun], squares: Tensor, state: State, given: Gradients, total: Total
) -> Sequence[Any]:
    """Move slabs of one group, by the squares of all processes."""
    counts = [one.squares.shape[1] for one in some]
    finite = torch.split(squares[2].isfinite(), counts)
    all_finite, ok = [own.all() for own in finite], given.ok
    moves: Sequence[Any] = [own if ok is None else ok & own for own in all_finite]
    if ok is None:
        moves = torch.stack(all_finite).tolist()
    of_scale, of_late, of_agreement = _scaled(some, counts, squares)
    reports = []
    for i, one in enumerate(some):
        if moves[i] is False:  # of the host
            continue
        found = _write(one, of_scale[i], of_late[i], moves[i], state, given)
        if one.stack.report is not None:
            reports.append((one, of_agreement[i], found))
    _report(reports, squares.dtype, total)
    return moves


def _scaled(
    some: Sequence[_Begun], counts: list[int], squares: Tensor
) -> tuple[Sequence[Tensor], Sequence[Late | None], Sequence[Tensor]]:
    """What natural gradients are multiplied by, the new sums, and how much gradients agree."""
    of_gradient, ahead, natural = squares.unbind()
    s, split = some[0].s, partial(torch.split, split_size_or_sections=counts)
    ones, no_late = split(torch.ones_like(natural)), [None] * len(some)
    if not s.normalized:
        return ones, no_late, ones
    on_device = partial(placed, dtype=squares.dtype, device=squares.device)
    kept = [one.stack.late for one in some if one.stack.late is not None]
    late = in_a_row(kept) if kept else None
    of_steps = torch.cat([_sizes(one).to(squares) for one in some])
    lengths = ahead.sqrt(), natural.sqrt()
    scale, late, agreement = scaled(s, of_steps, of_gradient, lengths, late)
    scale, agreement = (on_device(x).expand_as(natural) for x in (scale, agreement))
    if late is None:
        return split(scale), no_late, split(agreement)
    numbers = zip(*(split(t) for _, t in late.named_arrays()), strict=True)
    return split(scale), [late.rebuild(own) for own in numbers], split(agreement)


def _report(
    reports: Sequence[tuple[_Begun, Tensor, Direction]], wide: torch.dtype, total: Total
) -> None:
    """Tell the diagnostics of slabs that moved."""
    own = [squares_of(one.slab, one.slab.joined(*found.parts), wide) for one, _, found in reports]
    for (one, agreement, found), squares in zip(reports, totals(own, total), strict=True):
        report, shape = one.stack.report, one.factors.averages.k.shape
        assert report is not None
        agreement = agreement if one.apart is None else agreement.view(-1, 2)[:, 0]
        report["agreement"] = agreement.reshape(shape)
        report["update"] = (one.s.lr * found.scale * squares.sqrt()).reshape(shape)


def _sizes(one: _Begun) -> Tensor:
    """What `scaled` takes of each matrix, with its bias beside it if apart."""
    _, d_out, d_in = one.slab.shape
    t_U = one.factors.averages.t_U.reshape(-1)
    of_weights: Tensor = size(sides(d_out, d_in, one.slab.kind.overlap), t_U, one.s.depth)
    if one.apart is None:
        return of_weights
    return torch.stack([of_weights, share_of_bias(d_in) * of_weights], -1).reshape(-1)


def _write(
    one: _Begun, scale: Tensor, late: Late | None, moves: Any, state: State, given: Gradients
) -> Direction:
    """Write what is new of a slab, unless an accelerator knows that it does not move."""
    stack, slab, natural, s = one.stack, one.slab, one.natural, one.s
    on_host = given.ok is None
    factors = settled(stack, one.factors, moves, state)
    batch, _, _ = slab.shape
    if not on_host:
        scale = torch.where(moves, scale, 0.0)
        natural = [torch.where(moves, n, 0.0) for n in natural]
        s = masked(s, moves, natural[0])
    momenta, bias = stack.momenta, None
    if one.apart is not None:
        scale, of_bias = scale.view(-1, 2).unbind(1)
        of_column, moved, ratio = one.apart
        bias = slab_centering.step_of_bias(slab, of_column, moved, (scale, of_bias), ratio)
        bias = bias if on_host else torch.where(moves, bias, 0.0)
    if s.normalized and batch:  # a weight is several matrices
        for piece in slab.pieces:
            own = piece.view(natural[piece.block])
            own *= scale[piece.matrices, None, None].to(own.dtype)
        scale = torch.ones_like(scale[0])
    u: Sequence[Tensor] = slab.parted(natural)
    if bias is not None:
        u = [*u, bias.reshape(slab.parameters[1].shape)]
    if not s.normalized:  # an average of natural gradients
        scale = torch.ones_like(scale[0])
        u, _ = averages(plus(u, one.decay), momenta, s, donate=True)
    if stack.momenta is not None and momenta is not None:
        if late is not None and stack.late is not None:
            late = late.map(lambda new, old: new.reshape(old.shape), stack.late)
            late = late if on_host else late.map(partial(either, moves), stack.late)
        stack.hold_momenta(momenta, late, state)
    if factors is not stack.factors:
        known = one.preconditioner if on_host else None
        stack.hold(factors, state, seen=True, preconditioner=known)
    c = scale.reshape(())
    of_biases = None if bias is None else 1.0
    found = Direction(u, c.item() if on_host else c, True, None, None, of_bias=of_biases)
    rounding = stack.rounding(given.settings(slab.parameters[0]))
    move(stack, found, given.settings, None if on_host else moves, rounding, state, slab.places)
    return found
