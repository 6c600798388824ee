"""What tensors do in their own way, for the core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from singd_core._array import expand
from singd_core._kernels import Kernels
from singd_torch.tensors import norms, scratch
from singd_torch.tensors.pieces import cut, on_host, read, read_all

# In numbers: a piece of the rows whose squares are summed up.
_SQUARED = 1 << 16
# In numbers: the part of a row whose cumulative sums are one product.
_SCANNED = 256


def _multiply_add(x: Tensor, c: float | Tensor, y: Any, out: Tensor | None) -> Tensor:
    if not isinstance(y, Tensor):
        y = scratch.constant(y, x)
    if isinstance(c, Tensor):
        return torch.addcmul(y, x, c, out=out)
    return torch.add(y, x, alpha=c, out=out)


def _add_product(Y: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # Matrices of a stack `baddbmm_` multiplies one by one, if they are views.
    return Y.addmm_(A, B) if Y.ndim == A.ndim == B.ndim == 2 else Y.add_(A @ B)


def _add_diagonal(A: Tensor, c: float | Tensor) -> Tensor:
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(expand(c, diagonal))
    return A


def _sums_of_squares(X: Tensor) -> Tensor:
    # The squares of all at once are memory that is new to the process: a third of the time that
    # the rows of a GPT take with diagonal factors.
    first, *others = cut(X, _SQUARED)
    found = (first * first).sum(-2)
    for piece in others:
        found += (piece * piece).sum(-2)
    return found


def _cumulative_sum(x: Tensor) -> Tensor:
    if on_host(x) or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    if not x.numel():
        return x
    # CUDA adds in any order, and refuses to; products with ones do not.
    d, b = x.shape[-1], _SCANNED
    parts = torch.nn.functional.pad(x, (0, -d % b)).reshape(*x.shape[:-1], -1, b)
    within = parts @ x.new_ones(b, b).triu_()
    q = parts.shape[-2]
    before = within[..., -1][..., None, :] @ x.new_ones(q, q).triu_(1)
    found: Tensor = (within + before.mT).flatten(-2)[..., :d]
    return found


def _product(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    if A.ndim == B.ndim == out.ndim == 3:  # `matmul` would make five views
        return torch.bmm(A, B, out=out)
    # Of two first axes that are no single one `matmul` makes copies: 0.9 ms on a CPU for blocks of
    # 64 with the columns of four 512 × 129 matrices, and 0.35 with one product for each.
    whole = B.is_contiguous() and out.is_contiguous()
    if out.ndim <= 3 or whole or not on_host(out):
        return torch.matmul(A, B, out=out)
    axis = 0 if len(out) <= out.shape[1] else 1
    for own in zip(*(x.unbind(axis) for x in (A, B, out)), strict=True):
        _product(*own)
    return out


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Along the last axis, `index_select` copies entry by entry: 1.9 ms on a CPU, `gather` 0.24."""
    if axis < x.ndim - 1:
        return x.index_select(axis, indices)
    return x.gather(axis, indices.expand(*x.shape[:-1], -1))


def _inverse(A: Tensor) -> Tensor:
    # `inv` waits to know whether there is an inverse. It comes by columns, and what is loaded is by
    # rows: products with the two differ in their last bits.
    inverse: Tensor = torch.linalg.inv_ex(A).inverse
    return inverse.contiguous()


def _is_view(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


KERNELS = Kernels(
    multiply_add=_multiply_add,
    add_product=_add_product,
    add_diagonal=_add_diagonal,
    product=_product,
    times=lambda A, B, out: torch.mul(A, B, out=out),
    take=_take,
    inverse=_inverse,
    sums_of_squares=_sums_of_squares,
    cumulative_sum=_cumulative_sum,
    norm=norms.norm,
    constant=scratch.constant,
    number=read,
    numbers=read_all,
    empty=scratch.empty,
    is_view=_is_view,
)
