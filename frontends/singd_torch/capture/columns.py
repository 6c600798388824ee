"""Products of rows with few columns, without the rows where these are patches or one-hot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from singd_core._array import widen
from singd_core.layers import LayerKind
from singd_core.layers._patches import pad


def times(kind: LayerKind, x: Tensor, V: Tensor) -> Tensor:
    """A V."""
    if kind.diagonal_inputs:
        seen, at = _looked_up(kind, x)
        return V[at] * seen[:, None]
    if kind.is_convolution:
        found = _convolved(kind, x, V)
        return kind.outputs(found, kfac_approx="expand", loss_average=None)[0]  # type: ignore[no-any-return]
    A: Tensor = kind.inputs(x, bias=False, kfac_approx="expand")[0]
    return A @ V.to(A)


def _convolved(kind: Any, x: Tensor, V: Tensor) -> Tensor:
    """The output of a convolution that has the columns of V as kernels, in each group."""
    sizes, strides, dilations, before, after = zip(*kind.windows, strict=True)
    if kind.padding_mode != "zeros" or before != after:
        x, before = pad(x, kind.windows, kind.padding_mode), (0,) * len(before)
    kernels = torch.cat([V.mT.to(x).reshape(V.shape[1], -1, *sizes)] * kind.groups)
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(sizes) - 1]
    return function(x, kernels, None, strides, before, dilations, kind.groups)


def transposed_times(
    kind: LayerKind, x: Tensor, right: Tensor, entries: int
) -> tuple[Tensor, Tensor]:
    """Aᵀ of what is on its right, and A; of a table what has the norm of both together."""
    if kind.diagonal_inputs:
        seen, at = _looked_up(kind, x)
        right = widen(right) * seen[:, None]
        return right.new_zeros(entries, right.shape[-1]).index_add_(0, at, right), right.new_ones(1)
    A, _ = kind.inputs(x, bias=False, kfac_approx="expand")
    return transposed_product(A, right.to(A)), A


def transposed_product(A: Tensor, B: Tensor) -> Tensor:
    """Aᵀ B for a B of few columns, which takes up to eight times as long on a CPU as Bᵀ A."""
    return (B.mT @ A).mT


def _looked_up(kind: LayerKind, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which indices get a gradient, and the indices."""
    at = x.flatten().long()
    return at != (-1 if kind.ignored is None else kind.ignored), at
