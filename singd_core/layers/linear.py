"""The rows of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from singd_core._array import Array, append_ones, namespace, sums_of_squares
from singd_core.layers._sampling import Sample
from singd_core.layers.base import (
    LayerKind,
    Shape,
    append_bias,
    is_expand,
    loss_terms,
    two_axes,
)
from singd_core.layers.tensor import Tensor


class OnLastAxis(LayerKind):
    """What linear maps of the last axis have in common, whose weight may be stored transposed."""

    transposed: bool

    @property
    def is_turned(self) -> bool:
        """Whether the weight is stored as (d_in, d_out)."""
        return self.transposed

    def inputs(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """The rows `A`, shape `(N, d_in [+ 1])`, of the input `(batch, *shared, d_in)`; and `N`."""
        x = _batched(x, "input x")
        expand = _expands(kfac_approx, x)
        N = prod(x.shape[:-1]) if expand else x.shape[0]
        x, factor = _some(x, expand, sample)
        if not expand and x.ndim > 2:
            x = namespace(x).mean(x, axis=tuple(range(1, x.ndim - 1)))
        A = _as_rows(x)
        A = A if factor == 1.0 else A * factor
        return (append_ones(A, 1, factor) if bias else A), N

    def diagonal_rows(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """One row of the roots of the diagonal of `AᵀA`: no copy of the input with ones."""
        A, N = self.inputs(x, bias=False, kfac_approx=kfac_approx, sample=sample)
        A = namespace(A).sqrt(sums_of_squares(A))[None, :]
        return (append_ones(A, 1, N**0.5) if bias else A), N

    def outputs(
        self,
        g: Array,
        *,
        kfac_approx: str,
        loss_average: str | int | None,
        sample: Sample | None = None,
    ) -> tuple[Array, int]:
        """The rows `B`, shape `(N, d_out)`, of the gradient `(batch, *shared, d_out)`; and `M`."""
        g = _batched(g, "output gradient g")
        expand = _expands(kfac_approx, g)
        M = loss_terms(loss_average, g.shape[0], g.shape[1:-1])
        g, factor = _some(g, expand, sample)
        if not expand and g.ndim > 2:
            g = namespace(g).sum(g, axis=tuple(range(1, g.ndim - 1)))
        B = _as_rows(g)
        return (B if factor == 1.0 else B * factor), M

    def positions(self, x: Array) -> Shape | None:
        """All axes but the last."""
        return tuple(x.shape[:-1])


@dataclass(frozen=True)
class Linear(OnLastAxis):
    """`z = W a + b` on the last axis: input `(batch, *shared, d_in)`, weight `(d_out, d_in)`.

    With `transposed` the weight is stored as `(d_in, d_out)`. The first axis is the batch; a single
    vector counts as a batch of one. All axes between the first and the last share the weight.

    Example:
        >>> import numpy as np
        >>> x, g = np.ones((8, 5, 3)), np.ones((8, 5, 2))  # a batch of 8 sequences of length 5
        >>> A, N = Linear().inputs(x, bias=True, kfac_approx="expand")
        >>> B, M = Linear().outputs(g, kfac_approx="expand", loss_average="batch")
        >>> A.shape, N, B.shape, M
        ((40, 4), 40, (40, 2), 8)
    """

    is_plain = True
    transposed: bool = False

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The weight as `(d_out, d_in)` with the bias `(d_out,)` as its last column."""
        return append_bias(weight.mT if self.transposed else weight, bias)

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """Views of the weight and of the bias `(d_out,)`."""
        weight = matrix[..., :-1] if bias else matrix
        return (weight.mT if self.transposed else weight), (matrix[..., -1] if bias else None)

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`((), d_out, d_in [+ 1])`."""
        first, last = two_axes(weight_shape, self)
        d_out, d_in = (last, first) if self.transposed else (first, last)
        return (), d_out, d_in + bias

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """A linear map, or a look-up in the same table."""
        return kind if isinstance(kind, Linear) or kind.diagonal_inputs else None

    def of_gradients(self) -> LayerKind | None:
        """The weight alone."""
        return Tensor(transposed=self.transposed)

    def of_transpose(self) -> LayerKind | None:
        """The linear map whose weight is stored the other way."""
        return Linear(not self.transposed)

    def has_rows_along(self, axis: int) -> bool | None:
        """Rows come first unless the weight is turned."""
        return axis == int(self.transposed)


def _expands(kfac_approx: str, x: Array) -> bool:
    """Whether each position is a row: also where there are none, which have no mean."""
    return is_expand(kfac_approx) or 0 in x.shape[:-1]


def _batched(x: Array, name: str) -> Array:
    if x.ndim == 0:
        raise ValueError(f"{name} of a linear layer is a number: give it at least the feature axis")
    return x if x.ndim > 1 else x[None, ...]


def _some(x: Array, expand: bool, sample: Sample | None) -> tuple[Array, float]:
    """Rows of any positions, or examples with all of them; and what they are multiplied by."""
    if sample is None:
        return x, 1.0
    return sample.rows(x) if expand else sample.take(x, sample.most)


def _as_rows(x: Array) -> Array:
    if x.ndim == 2:
        return x
    return namespace(x).reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
