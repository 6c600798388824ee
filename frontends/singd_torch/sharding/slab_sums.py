"""What steps of layers in parts sum over the processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singd_core._settings import Settings
from singd_core.curvature import Curvature
from singd_core.levels import FLOOR, sums
from singd_core.rules import Shampoo
from singd_core.structures import Structure
from singd_torch.sharding.slab import Slab
from singd_torch.step.levels import due_levels, hold_levels
from singd_torch.step.stack import Stack

Total: TypeAlias = Callable[[Tensor], Tensor]


def totals(tensors: Sequence[Tensor], total: Total) -> list[Tensor]:
    """The sums of tensors over the processes, in one call."""
    if not tensors:
        return []
    parts = torch.split(
        total(torch.cat([t.reshape(-1) for t in tensors])), [t.numel() for t in tensors]
    )
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def slab_in(stack: Stack) -> Slab:
    """The slab of a stack, which is alone in it."""
    (slab,) = stack.layers
    assert isinstance(slab, Slab)
    return slab


def squares_of(
    slab: Slab, blocks: Sequence[Tensor], wide: torch.dtype, *, of_bias: bool = False
) -> Tensor:
    """What this process adds to the sums of squares of the matrices, or of biases as columns."""
    batch, _, _ = slab.shape
    found = torch.zeros(math.prod(batch), dtype=wide, device=slab.weight.device)
    for piece in slab.pieces:
        own = torch.linalg.vector_norm(piece.view(blocks[piece.block]), dim=(-2, -1), dtype=wide)
        block = slab.blocks[piece.block]
        n = block.copies_of_bias if of_bias else block.copies
        found[piece.matrices or slice(None)] += own.square() / n
    return found


def level(moved: Sequence[tuple[Stack, Settings, Sequence[Tensor], Any]], total: Total) -> None:
    """Tell factors of natural gradients, if the next step makes anew what preconditions.

    `moved` has stacks, their settings, the natural gradients of blocks, and whether they moved.
    """
    found, own_sums = [], []
    for stack, s, natural, moves in moved:
        asked = due_levels(stack, s)
        if asked is None:
            continue
        slab, (levels, weight) = slab_in(stack), asked
        rows, columns = torch.zeros_like(levels.rows), torch.zeros_like(levels.columns)
        for piece in slab.pieces:
            weights = piece.at(levels.rows + FLOOR, levels.columns + FLOOR)
            both = sums(piece.view(natural[piece.block]), *weights)
            for place, own in zip(piece.at(rows, columns), both, strict=True):
                place += own / slab.blocks[piece.block].copies
        own_sums += [rows, columns]
        found.append((stack, moves, levels, weight))
    of_all = iter(totals(own_sums, total))
    for stack, moves, levels, weight in found:
        hold_levels(stack, levels, levels.updated(next(of_all), next(of_all), weight), moves)


def learned_of(
    stacks: Sequence[Stack], gradient_of: Callable[[Stack], Sequence[Tensor]], total: Total
) -> dict[Stack, Curvature]:
    """What refreshes of slabs without rows want of the gradients of all parts."""
    found: dict[Stack, Curvature] = {}
    for stack in stacks:
        slab, factors = slab_in(stack), stack.factors
        assert isinstance(factors, Shampoo)
        _, d_out, d_in = slab.shape
        blocks = slab.joined(*gradient_of(stack))
        h, t = (torch.zeros_like(factors.averages.t_G) for _ in range(2))
        H_K, H_C = (L.map(partial(torch.zeros_like, dtype=t.dtype)) for L in factors.sides)
        for piece in slab.pieces:
            K, C = piece.factor(factors.K, piece.columns), piece.factor(factors.C, piece.rows)
            own = piece.view(blocks[piece.block])
            if not own.numel():
                continue
            part = dataclasses.replace(factors.measuring(), K=K, C=C).curvature(own)
            n = 1.0 / slab.blocks[piece.block].copies
            rows, columns = own.shape[-2] / d_out * n, own.shape[-1] / d_in * n
            _add(piece.factor(H_K, piece.columns), part.H_K, rows)
            _add(piece.factor(H_C, piece.rows), part.H_C, columns)
            for place, mean in ((h, part.t_U), (t, part.t_G)):
                of_piece = place if piece.matrices is None else place[piece.matrices]
                of_piece += mean * (rows * columns / n)
        found[stack] = Curvature(H_K, H_C, h, t)
    sums = iter(totals([a for own in found.values() for _, a in own.named_arrays()], total))
    return {stack: own.map(lambda _: next(sums)) for stack, own in found.items()}


def _add(place: Structure, new: Structure, share: float) -> None:
    place.map(lambda old, own: old.add_(own, alpha=share), new)
