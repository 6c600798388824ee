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
    the last `ins` its columns.

    Example:
        >>> Tensor.of((64, 32, 3, 3))  # the kernel of a convolution: 64 × 288
        Tensor(stack=0, outs=1, ins=3)
        >>> Tensor.of((8, 256, 1024))  # 8 experts
        Tensor(stack=1, outs=1, ins=1)
    """

    stack: int = 0
    outs: int = 1
    ins: int = 1

    has_rows = False

    @staticmethod
    def fits(shape: Sequence[int]) -> bool:
        """Whether a shape holds matrices: two axes are longer than 1, and none is empty."""
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

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The tensor as `(*stack, d_out, d_in)`; a bias is a parameter of its own."""
        if self.outs == self.ins == 1:
            return weight
        first = weight.ndim - self.stack - self.outs - self.ins
        batch, d_out, d_in = self.shape(weight.shape[first:], bias=False)
        return namespace(weight).reshape(weight, (*weight.shape[:first], *batch, d_out, d_in))

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The tensor, of shape `weight_shape`."""
        if self.outs == self.ins == 1:
            return matrix, None
        first = matrix.shape[: matrix.ndim - self.stack - 2]
        return namespace(matrix).reshape(matrix, (*first, *weight_shape)), None

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`(stack, d_out, d_in)`."""
        last = self.stack + self.outs
        outs, ins = weight_shape[self.stack : last], weight_shape[last:]
        return tuple(weight_shape[: self.stack]), prod(outs), prod(ins)

    def has_rows_along(self, axis: int) -> bool | None:
        """The first axis has rows, of all matrices if it counts these."""
        if axis == 0:
            return True
        return False if (self.stack, self.outs, axis) == (0, 1, 1) else None
