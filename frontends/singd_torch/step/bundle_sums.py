"""The sums over late gradients of all matrices of a bundle, in one array."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from singd_core.late import Late
from singd_torch.step.stack import Stack
from singd_torch.tensors.layout import slices


class Sums:
    """Numbers of all weights, then of all biases that are apart: those of the first stacks.

    Args:
        stacks: The stacks, those first whose biases are apart.
        apart: How many these are.
        like: It tells the device.
    """

    def __init__(self, stacks: Sequence[Stack], apart: int, like: Tensor) -> None:
        self._stacks, self._apart = stacks, apart
        self._places = slices(stack.numbers for stack in stacks)
        biases = self._places[apart - 1].stop if apart else 0
        zeros = Late.zeros((self._places[-1].stop + biases,), like)
        self._all = torch.stack([t for _, t in zeros.named_arrays()])

    def part(self, i: int) -> Late:
        """The sums of a stack, views: a bias has its own as far behind its weight as any other."""
        batch, place, n = self._stacks[i].batch, self._places[i], self._places[-1].stop
        if i >= self._apart:
            return Late(*(own[place].view(batch) for own in self._all.unbind()))
        # of the n + 1 numbers from a weight's on, the first is its own and the last its bias's
        pairs = self._all.unfold(1, n + 1, 1)[:, place, ::n] if n else self._all
        return Late(*(own.view(*batch, 2) for own in pairs.unbind()))

    @property
    def late(self) -> Late:
        """The sums, first of all weights."""
        return Late(*self._all.unbind())

    def write(self, late: Late, moves: Tensor) -> None:
        """Take new sums of what moves."""
        new = torch.stack([t for _, t in late.named_arrays()])
        torch.where(moves, new, self._all, out=self._all)
