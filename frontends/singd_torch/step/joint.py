"""The factors of several stacks as the factors of one layer, with numbers for each matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core._settings import Settings
from singd_core.curvature import Averages, Curvature
from singd_core.levels import EVEN, Levels
from singd_core.preconditioner import Preconditioner, Side
from singd_core.rounding import Rounding
from singd_core.rules import InverseFree, Shampoo, inputs_of
from singd_core.rules.centering import InputMean
from singd_torch.step.stack import Stack
from singd_torch.tensors.join import in_a_row
from singd_torch.tensors.layout import Group, Layout
from singd_torch.tensors.many import Many


class Joint:
    """Where the factors of each stack are among all.

    Attributes:
        stacks: The stacks.
        K: Where each K is.
        C: Where each C is.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks
        of_K, of_C = [], []
        for stack in stacks:
            (_, d_out, d_in), (K, C) = stack.layers[0].shape, inverse_free(stack).structures
            of_K.append(Group(K, d_in, stack.batch, d_out))
            of_C.append(Group(C, d_out, stack.batch, d_in))
        self.K, self.C = (Layout(groups, stacks[0].device) for groups in (of_K, of_C))

    def factors(self, averages: Averages, levels: Levels | None) -> InverseFree:
        """The factors of all, in memory of their own, with these numbers and levels."""
        each = [inverse_free(stack) for stack in self.stacks]
        K: Any = Many.joined(self.K, [own.K for own in each], owned=True)
        C: Any = Many.joined(self.C, [own.C for own in each], owned=True)
        means = [inputs for inputs in map(inputs_of, each) if inputs is not None]  # of the first
        return _with(each[0], K, C, averages, levels, in_a_row(means) if means else None)

    def copied(self) -> InverseFree:
        """The factors of all, in memory of their own, with the numbers and levels of the stacks."""
        each = [inverse_free(stack) for stack in self.stacks]
        averages = in_a_row([own.averages for own in each])
        if all(own.levels is None for own in each):
            return self.factors(averages, None)
        like, ends = averages.k, (side.rows[-1].stop for side in (self.C, self.K))
        levels = Levels(*(like.new_full((end,), EVEN) for end in ends))
        for i, own in enumerate(each):
            if own.levels is not None:
                self.levels(i, levels).map(Tensor.copy_, own.levels)
        return self.factors(averages, levels)

    def curvature(self, each: Sequence[Curvature], like: Tensor) -> Curvature:
        """The curvature of all."""
        H_K: Any = Many.joined(self.K, [own.H_K for own in each])
        H_C: Any = Many.joined(self.C, [own.H_C for own in each])
        t_U, t_G = (
            torch.cat([t.reshape(-1) for t in ts]).to(like)
            for ts in ([own.t_U for own in each], [own.t_G for own in each])
        )
        return Curvature(H_K, H_C, t_U, t_G)

    def of(self, i: int, numbers: Any) -> Any:
        """The numbers of the matrices of a stack, a view, where matrices have their own."""
        if not (isinstance(numbers, Tensor) and numbers.ndim):
            return numbers
        return numbers[self.K.numbers[i]].view(self.stacks[i].batch)

    def columns(self, i: int, of_all: Tensor) -> Tensor:
        """What the columns of the matrices of a stack have, a view."""
        return self._along(i, self.K, of_all)

    def _along(self, i: int, side: Layout, of_all: Tensor) -> Tensor:
        """What the columns or the rows of the matrices of a stack have, a view."""
        return of_all[side.rows[i]].view((*self.stacks[i].batch, -1))

    def part(self, i: int, factors: InverseFree) -> InverseFree:
        """The factors of a stack, views."""
        K, C = many(factors)
        averages, levels = factors.averages.map(lambda t: self.of(i, t)), None
        if factors.levels is not None and self.measures(i):
            levels = self.levels(i, factors.levels)
        inputs = None
        if self.stacks[i].is_apart:
            means = inputs_of(factors)
            assert means is not None
            numbers = (self.of(i, t) for t in (means.squares, means.used))
            inputs = InputMean(self.columns(i, means.mean), *numbers)
        return _with(factors, K.part(i), C.part(i), averages, levels, inputs)

    def measures(self, i: int) -> bool:
        """Whether the factors of a stack have levels."""
        return inverse_free(self.stacks[i]).levels is not None

    def levels(self, i: int, levels: Levels) -> Levels:
        """The levels of a stack, views."""
        return Levels(self._along(i, self.C, levels.rows), self.columns(i, levels.columns))

    def as_levels(self, vector: Tensor) -> Levels:
        """What all columns have, then all rows, as levels, views."""
        columns, rows = torch.split(vector, [side.rows[-1].stop for side in (self.K, self.C)])
        return Levels(rows, columns)

    def write(self, old: InverseFree, new: InverseFree, keep: Tensor) -> None:
        """Take what is new of the matrices that are to be kept."""
        for own, other in zip(many(old), many(new), strict=True):
            own.write(other, keep)
        old.averages.map(lambda a, b: torch.where(keep, b, a, out=a), new.averages)

    def rounding(self, s: Settings) -> Any:
        """How they are stored, None if to the nearest number."""
        each = [stack.rounding(s) for stack in self.stacks]
        return None if each[0] is None else _Rounding(each)

    def preconditioners(self, factors: InverseFree, T: int) -> list[Preconditioner]:
        """What preconditions T gradients of each stack."""
        scales = [scale for scale in factors.scales(balanced=True) if scale is not None]
        made = factors.preconditioner(T, balanced=True, scales=scales)
        each = zip((made.K, made.C), many(factors), scales, (self.K, self.C), strict=True)
        K, C = ([self._side(i, *own) for i in range(len(self.stacks))] for own in each)
        return [Preconditioner(*sides) for sides in zip(K, C, strict=True)]

    def _side(self, i: int, of_all: Side, L: Many, scale: Tensor, layout: Layout) -> Side:
        known: Any = of_all.L
        if of_all.whole and known.known[i]:
            return Side(known.part(i), True)
        return Side(L.part(i), False, self._along(i, layout, scale))


class _Rounding:
    """How the arrays of each stack are stored."""

    def __init__(self, each: Sequence[Any]) -> None:
        self._each: Sequence[Rounding] = each

    def tree(self, new: Many, name: str) -> Many:
        """The matrices, rounded."""
        pairs = zip(self._each, new.parts(), strict=True)
        return Many.joined(new.layout, [rounding.tree(own, name) for rounding, own in pairs])


def _with(
    like: InverseFree,
    K: Any,
    C: Any,
    averages: Averages,
    levels: Levels | None,
    inputs: InputMean | None,
) -> InverseFree:
    """Factors of the same rule, without Riemannian momenta."""
    means = {"inputs": inputs} if isinstance(like, Shampoo) else {}
    return dataclasses.replace(
        like, K=K, C=C, m_K=None, m_C=None, averages=averages, levels=levels, **means
    )


def inverse_free(stack: Stack) -> InverseFree:
    """The factors of a stack, which step together with others."""
    assert isinstance(stack.factors, InverseFree)
    return stack.factors


def many(factors: InverseFree) -> tuple[Many, Many]:
    """K and C of all."""
    K: Any = factors.K
    C: Any = factors.C
    return K, C
