"""The levels of stacks and of bundles: how large rows and columns of natural gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from singd_core._array import Scalar
from singd_core._scalars import number
from singd_core._settings import Settings, is_due, rate_of_factors
from singd_core.levels import FLOOR, Levels, multipliers, sums, weight_of
from singd_torch.step.begun import zero_unless
from singd_torch.step.bundle import Bundle
from singd_torch.step.stack import Stack
from singd_torch.tensors.matrices import norms_of
from singd_torch.tensors.scratch import constant
from singd_torch.tensors.select import either

# Natural gradients of more numbers are squared in parts.
_WHOLE = 1 << 24


def level(stack: Stack, s: Settings, natural: Tensor | None, moves: Any) -> None:
    """Tell the factors of a natural gradient, if the next step makes anew what preconditions."""
    asked = due_levels(stack, s)
    if natural is not None and asked is not None:
        levels, weight = asked
        hold_levels(stack, levels, levels.measured(natural, weight), moves)


def due_levels(stack: Stack, s: Settings) -> tuple[Levels, Scalar] | None:
    """The levels, and how much a measurement of this step counts; None if it measures none."""
    steps, factors = stack.layers[0].group["steps"] + 1, stack.factors
    if factors is None or factors.levels is None or not is_due(steps, s):
        return None
    return factors.levels, weight_of(number(factors.averages.k), rate_of_factors(steps, s))


def hold_levels(stack: Stack, levels: Levels, new: Levels, moves: Any) -> None:
    """Have new levels, in the place of those before, where the stack moves."""
    if isinstance(moves, Tensor):
        new = new.map(partial(either, moves), levels)
    levels.map(Tensor.copy_, new)
    stack.preconditioner = None


def measure(bundle: Bundle, s: Settings, natural: Sequence[Tensor], moves: Tensor) -> None:
    """Tell the factors of natural gradients, if the next step makes anew what preconditions.

    It is `singd_core.levels.leveled` of all matrices. `moves` tells which of them count.
    """
    steps = bundle.stacks[0].layers[0].group["steps"] + 1
    if not is_due(steps, s) or bundle.levels is None:
        return
    joint, of = bundle.joint, bundle.levels + FLOOR
    weights = joint.as_levels(of)
    found: tuple[list[Tensor], list[Tensor]] = [], []  # of columns, and of rows
    for i, (stack, n) in enumerate(zip(bundle.stacks, natural, strict=True)):
        columns, rows = joint.levels(i, weights).sides
        if joint.measures(i):
            of_rows, of_columns = sums(n, rows, columns, -(-n.numel() // _WHOLE))
            stack.preconditioner = None
        else:
            of_rows, of_columns = (constant(0.0, of).expand(one.shape) for one in (rows, columns))
        found[0].append(of_columns)
        found[1].append(of_rows)
    squares = (torch.cat([own.reshape(-1) for side in found for own in side]) * of).nan_to_num_(
        0.0, 0.0, 0.0
    )
    of_rows = joint.as_levels(squares).rows
    each = [
        matrix
        for group, place in zip(joint.C.groups, joint.C.rows, strict=True)
        for matrix in of_rows[place].view(group.count, -1).unbind()
    ]
    rate = rate_of_factors(steps, s)
    rate = zero_unless(moves, rate) if isinstance(rate, Tensor) else rate
    weight = weight_of(bundle.factors.averages.k, rate) * moves
    new, old = multipliers(norms_of(each, 1), weight)
    of_sides = (
        side.on_rows(torch.stack([new, old, side.powers(1.0, new)])) for side in (joint.K, joint.C)
    )
    new, old, lengths = torch.cat([*of_sides], 1)
    torch.addcmul(bundle.levels * old, squares * new, lengths, out=bundle.levels)
