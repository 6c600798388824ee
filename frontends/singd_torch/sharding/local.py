"""Which layers are stepped in the parts in which they are, and which part of them is here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from singd_core.structures import Diagonal
from singd_torch.layers.layer import Layer
from singd_torch.sharding.box import Box

# Factors of so many numbers cost a process nothing.
_SMALL = 4096
# The bytes of all others, in shares of the bytes of all state.
_MOST = 0.1
# What a step sums of each matrix over the processes, and of each bias that is apart.
NORMS = 3


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows and columns of the matrices of a layer, and how many processes have the same.

    The rows of several matrices are counted one matrix after the other.

    Attributes:
        rows: The rows.
        columns: The columns.
        copies: How many processes have the same.
        copies_of_bias: How many have the same rows of a bias that is apart.
        in_columns: Whether some process has only some of the columns of the layer.
    """

    rows: slice
    columns: slice
    copies: int = 1
    copies_of_bias: int = 1
    in_columns: bool = False


# What a process has of a layer: of its matrices [W | b], or of W and of b each.
Blocks: TypeAlias = tuple[Block, ...]


def local(
    layers: Sequence[Layer],
    places: Mapping[nn.Parameter, Sequence[Box]],
    sizes: Mapping[nn.Parameter, int],
    factors: Mapping[nn.Parameter, int],
) -> dict[nn.Parameter, list[Blocks]]:
    """The parts of layers that all processes step, each its own, by weight and process.

    Those are layers with a diagonal factor along the axis that is parted, as long as all processes
    can have their factors: small ones, and those whose bytes are a tenth of a process's share.
    `sizes` are the bytes of each layer's state, and `factors` the bytes of its factors.
    """
    found: dict[nn.Parameter, list[Blocks]] = {}
    processes = max((len(boxes) for boxes in places.values()), default=1)
    left = _MOST * sum(sizes.values()) / processes
    for layer in sorted(layers, key=lambda layer: factors[layer.weight]):
        parts = _parts(layer, places)
        if parts is None:
            continue
        if numbers(layer) > _SMALL:
            if factors[layer.weight] > left:
                continue
            left -= factors[layer.weight]
        found[layer.weight] = parts
    return found


def _parts(layer: Layer, places: Mapping[nn.Parameter, Sequence[Box]]) -> list[Blocks] | None:
    """The parts of a layer on each process, None if they cannot be stepped by themselves."""
    weights = _blocks(layer, places[layer.weight])
    if weights is None or len(set(places[layer.weight])) == 1:
        return None
    batch, d_out, d_in = layer.shape
    matrices = math.prod(batch)
    if batch and norms(layer) * len(weights) > layer.weight.numel():
        return None  # the norms of matrices so small are more than their gradients
    parts: list[Blocks] = [(block,) for block in weights]
    if layer.bias is not None and layer.bias_is_apart:
        # a bias makes up for what its weight does in the same rows
        of_bias = _rows_of_bias(places[layer.bias], layer.bias, matrices * d_out)
        if of_bias != [b.rows for b in weights]:
            return None
        in_columns = not all(_all(b.columns, d_in) for b in weights)
        counts = Counter(places[layer.bias])
        of_copies = (counts[box] for box in places[layer.bias])
        parts = [
            (dataclasses.replace(b, copies_of_bias=n, in_columns=in_columns),)
            for b, n in zip(weights, of_copies, strict=True)
        ]
    elif layer.bias is not None:
        biases = _bias_blocks(places[layer.bias], layer.bias, d_in - 1)
        if biases is None:
            return None
        parts = list(zip(weights, biases, strict=True))
        if all(dataclasses.replace(b, columns=slice(0, d_in - 1)) == w for w, b in parts):
            parts = [(dataclasses.replace(w, columns=slice(0, d_in)),) for w in weights]
    K, C = layer.structures
    blocks = [block for part in parts for block in part]
    if not issubclass(C, Diagonal) and not all(_all(b.rows, matrices * d_out) for b in blocks):
        return None
    if not issubclass(K, Diagonal) and not all(_all(b.columns, d_in) for b in blocks):
        return None
    return parts


def _blocks(layer: Layer, boxes: Sequence[Box]) -> list[Block] | None:
    """The parts of a weight as blocks, None if some are none or do not make the weight."""
    shape, (batch, d_out, d_in) = layer.weight.shape, layer.shape
    if not _cover(boxes, shape):
        return None
    rows, columns = math.prod(batch) * d_out, d_in - layer.has_bias_column
    counts, found = Counter(boxes), []
    for box in boxes:
        of_rows, of_columns = slice(0, rows), slice(0, columns)
        for axis, n in enumerate(box.shape):
            if n == shape[axis]:
                continue
            is_rows = layer.kind.has_rows_along(axis)
            if is_rows is None:
                return None
            each = (rows if is_rows else columns) // shape[axis]
            start = box.offset[axis] * each
            if is_rows:
                of_rows = slice(start, start + n * each)
            else:
                of_columns = slice(start, start + n * each)
        found.append(Block(of_rows, of_columns, counts[box]))
    return found


def numbers(layer: Layer) -> int:
    """How many numbers its factors have, with the mean of its inputs if a bias tells it.

    As many are summed over the processes when gradients refresh them.
    """
    batch, d_out, d_in = layer.shape
    K, C = layer.structures
    mean = d_in if layer.bias_is_apart else 0
    return math.prod(batch) * (K.numbers(d_in) + C.numbers(d_out) + mean)


def norms(layer: Layer) -> int:
    """How many numbers a step sums of a layer over the processes."""
    return NORMS * math.prod(layer.shape[0]) * (2 if layer.bias_is_apart else 1)


def _rows_of_bias(boxes: Sequence[Box], bias: nn.Parameter, rows: int) -> list[slice] | None:
    """Which rows of the matrices the parts of a bias belong to, None if they are none."""
    shape = bias.shape
    if not _cover(boxes, shape) or any(box.shape[1:] != shape[1:] for box in boxes):
        return None
    each = rows // shape[0]
    starts = (box.offset[0] * each for box in boxes)
    return [
        slice(start, start + box.shape[0] * each) for start, box in zip(starts, boxes, strict=True)
    ]


def _bias_blocks(boxes: Sequence[Box], bias: nn.Parameter, column: int) -> list[Block] | None:
    """The parts of a bias, which is the last column."""
    if not _cover(boxes, bias.shape):
        return None
    counts, columns = Counter(boxes), slice(column, column + 1)
    ends = ((box, box.offset[0], box.offset[0] + box.shape[0]) for box in boxes)
    return [Block(slice(start, end), columns, counts[box]) for box, start, end in ends]


def _cover(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether parts make a whole, each number in one of them."""
    return sum(box.numel for box in set(boxes)) == math.prod(shape)


def _all(part: slice, n: int) -> bool:
    return part == slice(0, n)
