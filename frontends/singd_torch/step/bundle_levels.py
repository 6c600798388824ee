"""The levels of a bundle: how large the rows and columns of natural gradients are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from singd_core._settings import Settings, is_due, rate_of_factors
from singd_core.levels import FLOOR, shares, sums, weight_of
from singd_torch.step.bundle import Bundle, norms_of
from singd_torch.tensors.scratch import constant

# Natural gradients of more numbers are squared in parts.
_WHOLE = 1 << 24


def measure(bundle: Bundle, s: Settings, natural: Sequence[Tensor], moves: Tensor) -> None:
    """Tell the factors of natural gradients, if the next step makes anew what preconditions.

    It is `singd_core.levels.leveled` of all matrices. `moves` tells which of them count.
    """
    steps = bundle.stacks[0].layers[0].group["steps"] + 1
    if not is_due(steps, s) or bundle.levels is None:
        return
    of = bundle.levels + FLOOR
    found: list[Tensor] = []
    for part, n in zip(bundle.parts, natural, strict=True):
        columns, rows = part.of_sides(of)
        if part.measures:
            of_rows, of_columns = sums(n, rows, columns, -(-n.numel() // _WHOLE))
            found += [of_columns, of_rows]
            part.stack.preconditioner = None
        else:
            found += [constant(0.0, of).expand(like.shape) for like in (columns, rows)]
    squares = (torch.cat([own.reshape(-1) for own in found]) * of).nan_to_num_(0.0, 0.0, 0.0)
    each = [
        matrix
        for part in bundle.parts
        for matrix in squares[part.sides[1]].view(part.count, -1).unbind()
    ]
    weight = weight_of(bundle.averages.k, rate_of_factors(steps, s)) * moves
    both = torch.stack(shares(norms_of(each, 1), weight)).index_select(1, bundle.matrix_of)
    torch.addcmul(bundle.levels * both[1], squares * bundle.length_of, both[0], out=bundle.levels)
