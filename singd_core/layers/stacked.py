"""The rows of linear layers whose weights are stored as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from singd_core._array import Array, namespace
from singd_core.layers.base import LayerKind, Shape, append_bias, two_axes, whole
from singd_core.layers.linear import Linear, OnLastAxis
from singd_core.layers.tensor import Tensor


@dataclass(frozen=True)
class StackedLinear(OnLastAxis):
    """`parts` linear layers in one weight `(parts · d_out, d_in)`: attention's query, key, value.

    Each part has factors of its own, on a batch axis. `inputs` and `outputs` take one part, because
    parts may have different rows, and different numbers of them. With `apart`, the weight has an
    axis for the parts, `(parts, d_out, d_in)`, as a stack of experts has. Then there is no bias.
    With `transposed` in addition, the weight is `(parts, d_in, d_out)`.

    Raises:
        ValueError: If `parts` is no whole number of at least 1.
    """

    parts: int
    apart: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", whole(f"parts = {self.parts!r}:", self.parts, 1))

    @property
    def is_stack(self) -> bool:
        """Whether the parts have an axis of their own."""
        return self.apart

    @property
    def row_parts(self) -> Sequence[int | None]:
        """Each part has rows of its own."""
        return range(self.parts)

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The parts, `(parts, d_out, d_in)`, each with its bias as the last column."""
        if self.apart:
            return weight.mT if self.transposed else weight
        *stack, _, d_in = weight.shape
        parts = namespace(weight).reshape(weight, (*stack, self.parts, -1, d_in))
        if bias is not None:
            bias = namespace(bias).reshape(bias, (*stack, self.parts, -1))
        return append_bias(parts, bias)

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The weight and the bias."""
        if self.apart:
            return (matrix.mT if self.transposed else matrix), None
        xp, stack = namespace(matrix), matrix.shape[:-3]
        weight = xp.reshape(matrix[..., :-1] if bias else matrix, (*stack, *weight_shape))
        return weight, xp.reshape(matrix[..., -1], (*stack, weight_shape[0])) if bias else None

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`((parts,), d_out, d_in [+ 1])`."""
        if self.apart:
            first, last = two_axes(weight_shape[1:], self)
            return (self.parts,), *((last, first) if self.transposed else (first, last))
        d_out, d_in = two_axes(weight_shape, self)
        return (self.parts,), d_out // self.parts, d_in + bias

    def has_rows_along(self, axis: int) -> bool | None:
        """The rows of all parts come first, unless the parts have an axis of their own."""
        return None if self.apart else axis == 0

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """A linear map by one of the matrices, where those have an axis of their own."""
        fits = self.apart and isinstance(kind, Linear) and kind.transposed is self.transposed
        return Linear() if fits else None

    def of_gradients(self) -> LayerKind | None:
        """One matrix of all parts, unless they have an axis of their own."""
        return None if self.apart else Tensor()

    def of_transpose(self) -> LayerKind | None:
        """The matrices stored the other way, where they have an axis of their own."""
        return replace(self, transposed=not self.transposed) if self.apart else None
