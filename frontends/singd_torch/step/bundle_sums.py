"""The sums over late gradients of all matrices of a bundle, in one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from singd_core.late import Late
from singd_torch.step.stack import Stack
from singd_torch.tensors.layout import slices


class Sums:
    """Numbers of all weights, then of all biases that are apart.

    The state has views of the array, in which a weight and its bias stand side by side.

    Args:
        stacks: The stacks. The biases of the first `apart` are apart.
        apart: How many.
        like: A tensor of the device of the weights and of their dtype.
    """

    def __init__(self, stacks: Sequence[Stack], apart: int, like: Tensor) -> None:
        self._stacks, self._apart = stacks, apart
        counts = [stack.numbers for stack in stacks]
        numbers, n = slices(counts), sum(counts)
        order = [
            np.stack([own, own + n], -1).reshape(-1) if i < apart else own
            for i, own in enumerate(np.arange(place.start, place.stop) for place in numbers)
        ]
        self._places = slices(len(own) for own in order)
        zeros = Late.zeros((self._places[-1].stop,), like)
        self._all = torch.stack([t for _, t in zeros.named_arrays()])
        self._order = self._back = None
        if apart:
            flat = np.concatenate(order)
            self._order, self._back = (
                torch.from_numpy(o).to(like.device, non_blocking=True)
                for o in (flat, flat.argsort())
            )

    def part(self, i: int) -> Late:
        """The sums of a stack, views."""
        shape = (*self._stacks[i].batch, *((2,) if i < self._apart else ()))
        return Late(*(own[self._places[i]].view(shape) for own in self._all.unbind()))

    @property
    def late(self) -> Late:
        """The sums, first of all weights."""
        ordered = self._all if self._back is None else self._all.index_select(1, self._back)
        return Late(*ordered.unbind())

    def write(self, late: Late, moves: Tensor) -> None:
        """Take new sums, in the order of `late`, of what moves."""
        new = torch.stack([t for _, t in late.named_arrays()])
        if self._order is not None:
            new, moves = new.index_select(1, self._order), moves.index_select(0, self._order)
        torch.where(moves, new, self._all, out=self._all)
