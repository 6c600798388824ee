"""A parameter that shows no rows, as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from singd_core._array import Array, namespace
from singd_core.layers.base import Shape, WithoutRows


@dataclass(frozen=True)
class Tensor(WithoutRows):
    """A parameter of two or more axes that is used where no layer can be watched.

    Its factors learn from its gradient alone (`singd_core.rules.shampoo`). The first `stack` axes
    count matrices, each with factors of its own; the next `outs` axes are the rows of a matrix, and
    the last `ins` its columns. If it is `transposed`, the columns come before the rows.

    A bias is no column of the matrix. It has the axes of the stack and of the rows.

    Example:
        >>> Tensor.of((64, 32, 3, 3))  # the kernel of a convolution: 64 × 288
        Tensor(stack=0, outs=1, ins=3, transposed=False)
        >>> Tensor.of((8, 256, 1024))  # 8 experts
        Tensor(stack=1, outs=1, ins=1, transposed=False)
        >>> Tensor.with_bias((256, 8, 64), (8, 64))  # a map to 8 heads
        Tensor(stack=0, outs=2, ins=1, transposed=True)
    """

    stack: int = 0
    outs: int = 1
    ins: int = 1
    transposed: bool = False

    has_rows = False

    @property
    def is_turned(self) -> bool:
        """Whether the columns come before the rows."""
        return self.transposed

    @staticmethod
    def fits(shape: Sequence[int]) -> bool:
        """Whether a shape without a bias holds matrices: two axes are longer than 1, none is empty.

        What is longer than 1 along a single axis may be a scale or a token, as well as a matrix.
        """
        return sum(n > 1 for n in shape) > 1 and 0 not in shape

    @classmethod
    def of(cls, shape: Sequence[int]) -> Self:
        """How a shape is most likely meant.

        Three axes with the shortest in front are a stack of matrices. All others are one
        matrix, cut where it is most nearly square.

        Raises:
            ValueError: If the shape has fewer than two axes.
        """
        axes = len(shape)
        if axes < 2:
            raise ValueError(f"a parameter of shape {tuple(shape)} is no matrix: it wants two axes")
        if axes == 3 and shape[0] < min(shape[1:]):
            return cls(1, 1, 1)
        shorter = [min(prod(shape[:i]), prod(shape[i:])) for i in range(1, axes)]
        outs = 1 + shorter.index(max(shorter))
        return cls(0, outs, axes - outs)

    @classmethod
    def with_bias(
        cls, shape: Sequence[int], bias: Sequence[int], *, transposed: bool = False
    ) -> Self | None:
        """How a shape is meant whose bias has this shape, None if that is no bias of it.

        None also if the matrix is a single row: AdamW trains a vector and its number.

        Args:
            shape: The shape of the weight.
            bias: The shape of the bias: the rows, after the stack if there is one.
            transposed: What a weight is that fits both ways, as a square one does.
        """
        shape, bias, axes = tuple(shape), tuple(bias), len(shape)
        if axes < 2 or 0 in shape:
            return None
        stacks = [n for n in (0, 1) if n < len(bias) and shape[:n] == bias[:n]]
        if cls.of(shape).stack:
            stacks.reverse()
        for stack in stacks:
            outs = len(bias) - stack
            ins = axes - stack - outs
            for turned in (transposed, not transposed):
                first = stack + ins if turned else stack
                if ins > 0 and shape[first : first + outs] == bias[stack:]:
                    # if the matrix is a single row, a gradient of its bias that is rounding alone
                    # looks as any other does
                    one_row = prod(bias[stack:]) == 1 and not cls.fits(shape)
                    return None if one_row else cls(stack, outs, ins, turned)
        return None

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The tensor as `(*stack, d_out, d_in)`, without the bias."""
        if self.outs > 1 or self.ins > 1:
            first = weight.ndim - self.stack - self.outs - self.ins
            _, *sides = self.shape(weight.shape[first:], bias=False)
            sides = sides[::-1] if self.transposed else sides
            leading = weight.shape[: first + self.stack]
            weight = namespace(weight).reshape(weight, (*leading, *sides))
        return weight.mT if self.transposed else weight

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The tensor, of shape `weight_shape`."""
        matrix = matrix.mT if self.transposed else matrix
        if self.outs == self.ins == 1:
            return matrix, None
        first = matrix.shape[: matrix.ndim - self.stack - 2]
        return namespace(matrix).reshape(matrix, (*first, *weight_shape)), None

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`(stack, d_out, d_in)`."""
        outs = prod(weight_shape[self._rows])
        ins = prod(weight_shape[self.stack :]) // max(1, outs)
        return tuple(weight_shape[: self.stack]), outs, ins

    @property
    def _rows(self) -> slice:
        """The axes of the rows."""
        first = self.stack + (self.ins if self.transposed else 0)
        return slice(first, first + self.outs)

    def has_rows_along(self, axis: int) -> bool | None:
        """The first axis has rows, or columns; with a stack it counts matrices, with all rows."""
        if axis == 0 and not (self.stack and self.transposed):
            return not self.transposed
        if (self.stack, self.outs, self.ins, axis) == (0, 1, 1, 1):
            return self.transposed
        return False if (self.stack, self.outs, axis) == (0, 1, 1) and not self.transposed else None
