"""Slabs of weights that learn from gradients and whose bias is known: steps without a mean.

It is `singd_core.without_mean` for the rows of a weight and of its bias that a process has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core._settings import rate_of_factors
from singd_core.preconditioner import Preconditioner
from singd_core.rules import inputs_of
from singd_core.rules.centering import InputMean, InputSums
from singd_torch.sharding.slab import Piece, Slab
from singd_torch.sharding.slab_sums import Total, slab_in, totals
from singd_torch.step.begun import Gradients
from singd_torch.step.stack import Stack


def told(stacks: Sequence[Stack], given: Gradients, total: Total) -> dict[Stack, InputMean]:
    """The means of the inputs, told by the gradients of all parts, of stacks that refresh now."""
    found: dict[Stack, InputMean] = {}
    flats: list[Tensor] = []
    for stack in stacks:
        inputs = inputs_of(stack.factors)  # type: ignore[arg-type]
        if inputs is None:
            continue
        slab = slab_in(stack)
        weight, bias = stack.joined(given.of)
        G, g = slab.joined(weight)[0], slab.column(bias)
        sums = InputSums(*(torch.zeros_like(t) for t in (inputs.mean, inputs.squares, inputs.used)))
        for piece in slab.pieces:
            own, block = InputSums.of(piece.view(G), piece.view(g), inputs.mean), slab.blocks[0]
            places = (t if piece.matrices is None else t[piece.matrices] for t in sums)
            counts = block.copies, block.copies_of_bias, block.copies
            for place, part, n in zip(places, own, counts, strict=True):
                of_columns = place[..., block.columns] if part is own.cross else place
                of_columns += part / n
        found[stack], flats = inputs, [*flats, *sums]
    means, of_all = {}, iter(totals(flats, total))
    for stack, inputs in found.items():
        layer, sums = slab_in(stack), InputSums(*(next(of_all) for _ in InputSums._fields))
        rate = rate_of_factors(layer.group["steps"], given.settings(layer.weight))
        means[stack] = inputs.told(sums, stack.averages.k, rate)
    return means


def centered(slab: Slab, inputs: InputMean, gradient: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of weight and bias, the first without the mean, in memory of its own."""
    weight, bias = gradient
    (G,), g = slab.joined(weight), slab.column(bias)

    out = torch.empty_like(G)
    for piece in slab.pieces:
        piece.of_matrices(inputs).centered(piece.view(G), piece.view(g), piece.view(out))
    return [*slab.parted([out]), bias]


def column(slab: Slab, preconditioner: Preconditioner, bias: Tensor) -> Tensor:
    """P_C g of the part of a bias that is here, as a column."""
    g = slab.column(bias)
    out = torch.empty_like(g, dtype=preconditioner.C.L.like.dtype)

    def solved(piece: Piece) -> Tensor:
        found: Tensor = piece.preconditioner(preconditioner).left(piece.view(g))
        return found

    return _by_pieces(slab, out, solved)


def along(slab: Slab, inputs: InputMean, natural: Tensor) -> Tensor:
    """The product n μ of the natural gradient n of a block, as a column.

    If other processes have other columns, the products of all are to be summed.
    """

    def product(piece: Piece) -> Tensor:
        found: Tensor = piece.of_matrices(inputs).along(piece.view(natural))
        return found

    return _by_pieces(slab, natural.new_empty(len(natural), 1), product)


def in_all_rows(slab: Slab, moved: Tensor, wide: torch.dtype) -> Tensor:
    """What this process adds to the sum of such products, for all rows of the layer."""
    block, (batch, d_out, _) = slab.blocks[0], slab.shape
    found = torch.zeros(math.prod(batch) * d_out, dtype=wide, device=moved.device)
    found[block.rows] = moved[:, 0].to(wide) / block.copies
    return found


def step_of_bias(
    slab: Slab, of_bias: Tensor, moved: Tensor, scales: tuple[Tensor, Tensor], ratio: Any
) -> Tensor:
    """What a step subtracts of a bias, in shares of its rate (6.4).

    Args:
        slab: The slab.
        of_bias: `column`.
        moved: `along`.
        scales: What multiplies the weight, and what multiplies the bias, for each matrix.
        ratio: As for `without_mean`.
    """

    def step(piece: Piece) -> Tensor:
        own = slice(None) if piece.matrices is None else piece.matrices
        shape = (1, 1) if piece.matrices is None else (-1, 1, 1)
        c, c_bias = (scale[own].reshape(shape) for scale in scales)
        new: Tensor = piece.view(of_bias) * c_bias - piece.view(moved) * (c * ratio)
        return new

    return _by_pieces(slab, torch.empty_like(of_bias), step)


def _by_pieces(slab: Slab, out: Tensor, of: Callable[[Piece], Tensor]) -> Tensor:
    for piece in slab.pieces:
        piece.view(out).copy_(of(piece))
    return out
