"""A process's rows or columns of a layer, with the factors of the whole layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

from torch import Tensor

from singd_core.layers.base import append_bias
from singd_core.preconditioner import Preconditioner, Side
from singd_core.rounding import Place
from singd_core.rules.centering import InputMean
from singd_core.structures import Structure
from singd_torch.layers.layer import Layer
from singd_torch.sharding.local import Blocks


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a block that are the same rows of some matrices.

    Attributes:
        block: The number of the block.
        of_block: Which of its rows.
        matrices: Which matrices of the layer it has rows of, None if the layer has one matrix.
        rows: Which rows of these, None for all.
        columns: Which columns, None for all.
    """

    block: int
    of_block: slice
    matrices: slice | None
    rows: slice | None
    columns: slice | None

    def view(self, block: Tensor) -> Tensor:
        """It as a matrix, or a batch of those, in the memory of its block."""
        own = block[self.of_block]
        if self.matrices is None:
            return own
        n = _length(self.matrices)
        return own.view(n, len(own) // n, own.shape[1])

    def at(self, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to its rows and columns, of numbers of all of them."""
        pairs = (of_rows, self.rows), (of_columns, self.columns)
        of_rows, of_columns = (_part(self._own(t), j) for t, j in pairs)
        return of_rows, of_columns

    def of_matrices(self, inputs: InputMean) -> InputMean:
        """The means of the inputs of its matrices, of its columns."""
        own = inputs.map(self._own)
        return dataclasses.replace(own, mean=_part(own.mean, self.columns))

    def factor(self, L: Structure, j: slice | None) -> Structure:
        """A factor of its matrices, or of their rows or columns `j`."""
        L = L if self.matrices is None else L.map(self._own)
        return L if j is None else L.part(j)

    def preconditioner(self, whole: Preconditioner) -> Preconditioner:
        """What of a preconditioner acts on it."""
        pairs = (whole.K, self.columns), (whole.C, self.rows)
        K, C = (
            Side(
                self.factor(side.L, j),
                side.whole,
                None if side.scale is None else _part(self._own(side.scale), j),
            )
            for side, j in pairs
        )
        return Preconditioner(K, C)

    def _own(self, t: Tensor) -> Tensor:
        return t if self.matrices is None else t[self.matrices]


@dataclasses.dataclass(eq=False)
class Slab(Layer):
    """Parts of the weight and of the bias of a layer, with the factors of all of it.

    Attributes:
        whole: The shape of all of the weight.
        blocks: Which rows and columns of the layer's matrices the parts are.
        places: Where the parts of the weight and of the bias stand in all of these.
    """

    whole: tuple[int, ...] = ()
    blocks: Blocks = ()
    places: tuple[Place, ...] = ()

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The shape of all matrices."""
        return self.kind.shape(self.whole, self.bias is not None)

    @cached_property
    def pieces(self) -> Sequence[Piece]:
        """The blocks by the matrices that they are rows of."""
        return list(self._by_matrices())

    def _by_matrices(self) -> Iterator[Piece]:
        batch, d_out, d_in = self.shape
        for i, block in enumerate(self.blocks):
            columns = None if _length(block.columns) == d_in else block.columns
            start, at, end = block.rows.start, block.rows.start, block.rows.stop
            if not batch:
                rows = None if end - at == d_out else block.rows
                yield Piece(i, slice(0, end - at), None, rows, columns)
                continue
            while at < end:
                matrix, row = divmod(at, d_out)
                some = (end - at) // d_out if row == 0 else 0  # those that are whole
                n = some * d_out or min(d_out - row, end - at)
                rows = None if some else slice(row, row + n)
                matrices = slice(matrix, matrix + max(1, some))
                yield Piece(i, slice(at - start, at - start + n), matrices, rows, columns)
                at += n

    def joined(self, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        """The blocks, from what belongs to the parts of the weight and of the bias.

        A bias that is apart is in none.
        """
        first, *others = self.blocks
        rows, columns = _length(first.rows), _length(first.columns)
        if bias is None or others or self.bias_is_apart:
            W = self._matrix(weight, rows, columns)
            return [W] if bias is None or self.bias_is_apart else [W, bias[:, None]]
        return [append_bias(self._matrix(weight, rows, columns - 1), bias)]

    def parted(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `joined`."""
        first, *others = blocks
        if self.has_bias_column and not others:
            first, others = first[:, :-1], [first[:, -1]]
        W = first.mT if self._is_turned else first
        return [W.reshape(self.weight.shape), *(b.reshape(-1) for b in others)]

    def column(self, bias: Tensor) -> Tensor:
        """What belongs to the part of a bias that is apart, beside the rows of its weight."""
        return bias.reshape(-1, 1)

    @property
    def _is_turned(self) -> bool:
        """Whether the weight has columns along its first axis."""
        return self.kind.has_rows_along(0) is False

    def _matrix(self, weight: Tensor, rows: int, columns: int) -> Tensor:
        if self._is_turned:
            return weight.reshape(columns, rows).mT
        return weight.reshape(rows, columns)


def _length(part: slice) -> int:
    n: int = part.stop - part.start
    return n


def _part(t: Tensor, j: slice | None) -> Tensor:
    return t if j is None else t[..., j]
