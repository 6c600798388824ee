"""The rows of a convolution, of any number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from singd_core._array import Array, append_ones, namespace, widen
from singd_core.layers._patches import PADDING_MODES, average_patch, pad, patches, patches_at
from singd_core.layers._sampling import Sample
from singd_core.layers._windows import Padding, Size, Window, check_kernel, windows
from singd_core.layers.base import (
    LayerKind,
    Shape,
    append_bias,
    is_expand,
    loss_terms,
    whole,
)
from singd_core.layers.tensor import Tensor


@dataclass(frozen=True)
class Convolution(LayerKind):
    """A convolution as the linear map of its patches, the output positions sharing the weight.

    Input `(batch, C_in, *spatial)`, or without the batch axis for a batch of one; weight
    `(C_out, C_in / groups, *kernel_size)`. A patch is flattened as `weight` is: the channel first,
    then the kernel's axes, `d_in = C_in / groups · K1 · K2 ...`.

    Channel groups are separate layers. With `groups > 1`, rows and matrix have a leading axis: `A`
    is `(groups, N, d_in [+ 1])`, `B` is `(groups, N, C_out / groups)` and the matrix is
    `(groups, C_out / groups, d_in [+ 1])`. With `average_groups` there is no such axis, and all
    groups have one `U`: the input is averaged over them, as in the authors' `singd` 0.0.5.

    Args:
        kernel_size: One entry for each spatial axis.
        stride: A number, or one for each spatial axis.
        padding: A number, or for each spatial axis a number or a pair (before, after); or `"same"`
            (only with stride 1) or `"valid"`.
        dilation: A number, or one for each spatial axis.
        groups: The number of channel groups.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`, as in torch.
        average_groups: Average the channel groups instead of keeping them apart.

    Raises:
        ValueError: If an argument has another value than these.

    Example:
        >>> import numpy as np
        >>> layer = Convolution((3, 3), padding=1, groups=2)
        >>> A, N = layer.inputs(np.ones((8, 4, 5, 5)), bias=True, kfac_approx="expand")
        >>> A.shape, N
        ((2, 200, 19), 200)
    """

    is_convolution = True

    # Equality goes by what the arguments mean: stride 1 and (1, 1) are the same kind of layer.
    kernel_size: Sequence[int] = field(compare=False)
    stride: Size = field(default=1, compare=False)
    padding: Padding = field(default=0, compare=False)
    dilation: Size = field(default=1, compare=False)
    groups: int = 1
    padding_mode: str = "zeros"
    average_groups: bool = False
    windows: tuple[Window, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        along = windows(self.kernel_size, self.stride, self.padding, self.dilation)
        object.__setattr__(self, "windows", tuple(along))
        object.__setattr__(self, "groups", whole(f"groups = {self.groups!r}:", self.groups, 1))
        if self.padding_mode not in PADDING_MODES:
            choices = ", ".join(map(repr, PADDING_MODES))
            raise ValueError(f"padding_mode = {self.padding_mode!r}: choose one of {choices}")

    def inputs(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """The rows `A`, shape `([groups,] N, d_in [+ 1])`, of `(batch, C_in, *spatial)`; `N`."""
        expand = is_expand(kfac_approx)
        x = self._batched(x, "input x")
        if sample is not None and expand:
            return self._some_inputs(x, bias, sample)
        N = x.shape[0]
        x, factor = (x, 1.0) if sample is None else sample.take(x, sample.most)
        xp, batch, spatial = namespace(x), x.shape[0], x.shape[2:]
        grouped = self._grouped(x)
        groups, channels = grouped.shape[1:3]
        d_in = channels * prod([window.size for window in self.windows])
        if not expand:
            x = xp.reshape(grouped, (batch, groups * channels, *spatial))
            a = average_patch(x, self.windows, self.padding_mode)
            A = xp.moveaxis(xp.reshape(a, (batch, groups, d_in)), 1, 0)
            A = A if factor == 1.0 else A * factor
            return self._ungrouped(append_ones(A, 2, factor) if bias else A), N
        # Columns first in memory: the rows are a transposed view, made in one copy. The bias' ones
        # travel as one more channel, cut to one column afterwards: 37 ms, where appending them to
        # the finished rows takes 63 (torch, two CPU cores, input (32, 64, 32, 32), 3x3 kernel).
        # A lone channel (depthwise) would so be doubled: its ones are one more entry of the patch.
        lone = channels == 1
        x = pad(xp.moveaxis(grouped, 0, 2), self.windows, self.padding_mode)
        x = append_ones(x, 1) if bias and not lone else x
        x = patches(x, self.windows, axis=2, one=bias and lone)
        N = prod(x.shape[3:])
        columns = xp.reshape(x, (groups, x.shape[1] * x.shape[2], N))
        return self._ungrouped(columns[:, : d_in + bias, :].mT), N

    def of_gradients(self) -> LayerKind | None:
        """The kernel alone; channel groups have several matrices, whose inputs differ."""
        return Tensor(ins=1 + len(self.windows)) if self.groups == 1 else None

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """A convolution with as many axes and groups, whatever its stride and padding."""
        if not isinstance(kind, Convolution) or self.groups != kind.groups:
            return None
        if len(self.windows) != len(kind.windows):
            return None
        return replace(kind, average_groups=self.average_groups)

    def has_rows_along(self, axis: int) -> bool | None:
        """Output channels are rows, and those that they see columns."""
        return {0: True, 1: False}.get(axis)

    def with_average_groups(self) -> LayerKind:
        """With the input averaged over the groups."""
        return replace(self, average_groups=True)

    def unfolded(self, x: Array, g: Array) -> int | None:
        """Each output position has a patch."""
        batched = x.ndim == len(self.windows) + 2 and x.shape[0] > 0
        return prod(g.shape[2:]) if batched else 0

    def _some_inputs(self, x: Array, bias: bool, sample: Sample) -> tuple[Array, int]:
        """Patches at some output positions; the others are never made."""
        positions = self._positions(x)
        lengths = (x.shape[0], *positions)
        counts, N = sample.counts(lengths), prod(lengths)
        if counts == lengths:
            return self.inputs(x, bias=bias, kfac_approx="expand")
        xp, grouped = namespace(x), self._grouped(sample.take(x, counts[0])[0])
        axes = enumerate(zip(positions, counts[1:], strict=True), start=1)
        at = [sample.indices(n, m, x, axis=i) for i, (n, m) in axes]
        x = pad(xp.moveaxis(grouped, 0, 2), self.windows, self.padding_mode)
        x = patches_at(x, self.windows, at)
        factor = (N / prod(counts)) ** 0.5
        columns = xp.reshape(x, (x.shape[0], prod(x.shape[1:-1]), x.shape[-1])) * factor
        columns = append_ones(columns, 1, factor) if bias else columns
        return self._ungrouped(columns.mT), N

    def diagonal_rows(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """One row of the roots of the diagonal of `AᵀA`, from sums over the batch of `x ∘ x`.

        One input of sums takes the place of all inputs.
        """
        if not is_expand(kfac_approx):
            return self.inputs(x, bias=bias, kfac_approx=kfac_approx, sample=sample)
        x, factor = self._batched(x, "input x"), 1.0
        batch = x.shape[0]
        if sample is not None:  # with all positions: their number costs next to nothing
            x, factor = sample.take(x, sample.counts((batch, *self._positions(x)))[0])
        x = widen(self._grouped(x))
        xp = namespace(x)
        sums = pad(xp.sum(x * x, axis=0), self.windows, self.padding_mode)
        seen = patches(sums, self.windows, axis=2)
        squares = xp.sum(seen, axis=tuple(range(3, seen.ndim)))
        A = xp.sqrt(xp.reshape(squares, (squares.shape[0], 1, prod(squares.shape[1:])))) * factor
        N = batch * prod(seen.shape[3:])
        A = append_ones(A, 2, N**0.5) if bias else A
        return self._ungrouped(A), N

    def outputs(
        self,
        g: Array,
        *,
        kfac_approx: str,
        loss_average: str | int | None,
        sample: Sample | None = None,
    ) -> tuple[Array, int]:
        """The rows `B`, shape `([groups,] N, d_out)`, of `(batch, C_out, *positions)`; and `M`."""
        expand = is_expand(kfac_approx)
        g = self._batched(g, "output gradient g")
        M = loss_terms(loss_average, g.shape[0], g.shape[2:])
        xp, factor = namespace(g), 1.0
        if sample is not None:
            counts = sample.counts((g.shape[0], *g.shape[2:])) if expand else (sample.most,)
            for axis, count in enumerate(counts):
                g, one = sample.take(g, count, axis and axis + 1, number=axis)
                factor *= one
        if not expand:
            g = xp.sum(g, axis=tuple(range(2, g.ndim)))
        g = self._by_group(g, "output channels", self._matrix_groups)
        g = xp.moveaxis(g, 0, 2)  # (groups, d_out, batch, *positions)
        columns = xp.reshape(g, (*g.shape[:2], prod(g.shape[2:])))
        columns = columns if factor == 1.0 else columns * factor
        return self._ungrouped(columns.mT), M

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The weight `(C_out, C_in / groups, *kernel_size)` and bias `(C_out,)` as a matrix."""
        xp, axes = namespace(weight), len(self.windows) + 2
        stack, one = weight.shape[:-axes], weight.shape[-axes:]
        groups, d_out, d_in = self.shape(one, bias=False)
        bias = None if bias is None else xp.reshape(bias, (*stack, *groups, d_out))
        return append_bias(xp.reshape(weight, (*stack, *groups, d_out, d_in)), bias)

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The weight, of shape `weight_shape`, and the bias `(C_out,)`."""
        xp, axes = namespace(matrix), 3 if self._matrix_groups > 1 else 2
        stack = matrix.shape[:-axes]
        weight = xp.reshape(matrix[..., :-1] if bias else matrix, (*stack, *weight_shape))
        return weight, xp.reshape(matrix[..., -1], (*stack, weight_shape[0])) if bias else None

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`((groups,), C_out / groups, d_in [+ 1])`, `((), C_out, d_in [+ 1])` without."""
        if len(weight_shape) != len(self.windows) + 2:
            raise ValueError(
                f"{self} has a weight of {len(self.windows) + 2} axes, not of shape "
                f"{tuple(weight_shape)}"
            )
        groups, d_in = self._matrix_groups, prod(weight_shape[1:]) + bias
        return ((groups,) if groups > 1 else ()), weight_shape[0] // groups, d_in

    def check_weight(self, weight_shape: Sequence[int], bias: bool) -> None:
        """Refuse also a kernel of another size."""
        super().check_weight(weight_shape, bias)
        check_kernel(self, self.windows, weight_shape)

    @property
    def overlap(self) -> float:
        """∏ max(1, kernel_size / stride): in so many patches a pixel takes part."""
        return prod([max(1.0, window.size / window.stride) for window in self.windows])

    @property
    def _matrix_groups(self) -> int:
        return 1 if self.average_groups else self.groups

    def _ungrouped(self, rows: Array) -> Array:
        return rows if self._matrix_groups > 1 else rows[0, ...]

    def _batched(self, x: Array, name: str) -> Array:
        n = len(self.windows)
        if x.ndim not in (n + 1, n + 2):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: with {n} entries in kernel_size it must be "
                f"(batch, channels, *spatial), {n + 2} axes, or {n + 1} without the batch"
            )
        return x if x.ndim == n + 2 else x[None, ...]

    def _positions(self, x: Array) -> tuple[int, ...]:
        """The numbers of output positions along the spatial axes of an input."""
        along = zip(self.windows, x.shape[2:], strict=True)
        return tuple(window.positions(n) for window, n in along)

    def _grouped(self, x: Array) -> Array:
        """The input by channel groups, or by their average."""
        grouped = self._by_group(x, "input channels", self.groups)
        if self.average_groups:
            return namespace(x).mean(grouped, axis=1)[:, None, ...]
        return grouped

    def _by_group(self, x: Array, name: str, groups: int) -> Array:
        """(batch, C, ...) as (batch, groups, C / groups, ...)."""
        batch, channels, *rest = x.shape
        if channels % groups:
            raise ValueError(f"{channels} {name} are not divisible by groups = {groups}")
        return namespace(x).reshape(x, (batch, groups, channels // groups, *rest))
