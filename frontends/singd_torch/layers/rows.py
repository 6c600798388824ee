"""The rows of a call of a layer, as its factors want them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from singd_core.layers import LayerKind, Sample
from singd_core.structures import Diagonal
from singd_torch.layers.layer import Layer
from singd_torch.layers.pending import Rows, begins_as
from singd_torch.layers.source import Source

# Calls of fewer numbers are measured together.
SMALL = 1 << 16
# Numbers that patches may always have; or else a quarter of what the input has.
_PATCHES = 1 << 18


def rows_of(
    layer: Layer, source: Source, x: Tensor, g: Tensor, mask: Tensor | None
) -> Iterator[Rows]:
    """The rows of one call, from its input and the gradient at its output, piece by piece."""
    group, kind = layer.group, source.kind
    if source.samples_axis(x) == 1:
        x, g = x.transpose(0, 1), g.transpose(0, 1)
    bias = layer.bias is not None and not source.swapped and source.biased
    # The rows of small calls wait for others as they are, to be squared together.
    diagonal = issubclass(layer.structures[source.swapped], Diagonal) and (
        kind.unfolded(x, g) is not None or x.numel() > SMALL
    )
    of_K, of_C = Sample.of_both(group["rows"], layer.structures, layer.shape, group["steps"])
    sample = (of_C, of_K) if source.swapped else (of_K, of_C)
    whole = diagonal or sample[0] is not None or group["kfac_approx"] != "expand"
    first, *others = (x,) if whole else in_pieces(layer, kind, x, g)
    loss_average = group["loss_average"]
    if source.samples and loss_average == "batch":
        loss_average = source.samples
    rows = Rows.of(
        kind,
        first,
        g,
        bias=bias,
        diagonal=diagonal,
        kfac_approx=group["kfac_approx"],
        loss_average=loss_average,
        mask=mask,
        sample=sample,
    )
    is_empty = 0 in (rows.A.shape[-2], rows.B.shape[-2])
    if is_empty and not source.samples:  # empty bags are samples all the same
        return
    if source.swapped and layer.bias is not None:  # a look-up does not see the bias
        rows = dataclasses.replace(rows, B=torch.nn.functional.pad(rows.B, (0, 1)))
    if not source.biased and layer.bias is not None:
        rows = dataclasses.replace(rows, A=torch.nn.functional.pad(rows.A, (0, 1)))
    if not others:
        yield rows
        return
    B, *more = torch.tensor_split(rows.B, 1 + len(others), dim=-2)
    yield dataclasses.replace(rows, B=B)
    for piece, B in zip(others, more, strict=True):
        A, N = kind.inputs(piece, bias=bias, kfac_approx=group["kfac_approx"])
        if not source.biased and layer.bias is not None:
            A = torch.nn.functional.pad(A, (0, 1))
        yield Rows(A, N, B, rows.M)


def check_sides(layer: Layer, source: Source, A: Tensor, B: Tensor) -> None:
    """Refuse the rows of a call that is not one of the layer it was taken for.

    Raises:
        ValueError: If they have other sides than the matrix of the layer.
    """
    _, d_out, d_in = layer.shape
    sides = A.shape[-1], B.shape[-1]
    inputs, outputs = sides[::-1] if source.swapped else sides
    if (inputs, outputs) != (d_in, d_out):
        ones = int(layer.bias is not None)
        raise ValueError(
            f"a call of the module of {layer.name!r} is no product with a weight of shape "
            f"{tuple(layer.weight.shape)}: its rows have {inputs - ones} inputs and {outputs} "
            f"outputs, and the matrix has {d_in - ones} and {d_out}. Give register_layer another "
            "kind for this class of modules, or a function that returns None for them"
        )


def is_masked(source: Source, x: Tensor, mask: Tensor) -> bool:
    """Whether a mask is of the positions of an input, so that it can leave some out."""
    x = x.transpose(0, 1) if source.samples_axis(x) == 1 else x
    return begins_as(source.kind.positions(x), mask)


def in_pieces(layer: Layer, kind: LayerKind, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The samples of an input in pieces, lest their patches be what sets the peak of memory."""
    positions = kind.unfolded(x, g)
    if not positions:
        return (x,)
    groups, _, d_in = layer.shape
    each = math.prod(groups) * d_in * positions  # numbers a sample
    return torch.split(x, max(1, max(x.numel() // 4, _PATCHES) // max(1, each)))
