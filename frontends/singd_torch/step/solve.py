"""What preconditions: large matrices without temporaries of their size, and where it stays."""

from __future__ import annotations

import torch
from torch import Tensor

from singd_core.preconditioner import Preconditioner
from singd_core.structures import Diagonal
from singd_torch.tensors import scratch
from singd_torch.tensors.pieces import cut, piece_size, rows_of_pieces
from singd_torch.tensors.scratch import PRODUCT


def by_pieces(preconditioner: Preconditioner, owned: bool, gradient: Tensor) -> Tensor:
    """The natural gradient, of a large matrix without temporaries of its size.

    It overwrites the gradient if that is `owned` and fits.
    """
    K, C = preconditioner.K, preconditioner.C
    most, block = piece_size(type(K.L), type(C.L)), C.L.blocks_of
    dtype = C.L.like.dtype
    fits = owned and gradient.dtype == dtype == K.L.like.dtype and K.whole and C.whole
    pieces = [slice(None)] if block is None else rows_of_pieces(gradient, most, block)
    if fits:
        for j in pieces:
            of_rows = preconditioner if len(pieces) == 1 else preconditioner.rows(j)
            _in_place(of_rows, gradient if len(pieces) == 1 else gradient[j])
        return gradient
    if len(cut(gradient, most)) == 1:
        small: Tensor = preconditioner(gradient)
        return small
    natural = gradient
    if not (owned and gradient.dtype == dtype):
        natural = torch.empty_like(gradient, dtype=dtype)
    if block is not None:
        for j in pieces:
            natural[j] = preconditioner.rows(j)(gradient[j])
        return natural
    for own, place in zip(cut(gradient, most), cut(natural, most), strict=True):
        place.copy_(preconditioner.right(own))
    for place in cut(natural.mT, most):
        place.mT.copy_(preconditioner.left(place.mT))
    return natural


def _in_place(preconditioner: Preconditioner, gradient: Tensor) -> None:
    """Write the natural gradient over the gradient."""
    room, sides = gradient, (preconditioner.K, preconditioner.C)
    if not all(isinstance(side.L, Diagonal) for side in sides):  # not entry by entry
        room = scratch.empty(gradient.shape, gradient, PRODUCT)
    natural = preconditioner.left(preconditioner.right(gradient, room), gradient)
    if natural is not gradient:
        gradient.copy_(natural)


def written(old: Preconditioner, new: Preconditioner) -> Preconditioner:
    """The old one with the numbers of the new one, where both are of the same kind."""
    pairs = (old.K, new.K), (old.C, new.C)
    if any(
        a.whole != b.whole or type(a.L) is not type(b.L) or (a.scale is None) != (b.scale is None)
        for a, b in pairs
    ):
        return new
    for a, b in pairs:
        a.L.map(lambda x, y: x if x is y else x.copy_(y), b.L)
        if a.scale is not None and b.scale is not None:
            a.scale.copy_(b.scale)
    return old
