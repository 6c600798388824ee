"""The rows of a transposed convolution, of any number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from singd_core._array import Array
from singd_core.layers._sampling import Sample
from singd_core.layers._windows import Size, check_kernel
from singd_core.layers.base import LayerKind, Shape, is_expand, loss_terms
from singd_core.layers.convolution import Convolution


@dataclass(frozen=True)
class TransposedConvolution(LayerKind):
    """A transposed convolution as the linear map from each input position to a patch of the output.

    Input `(batch, C_in, *spatial)`, or without the batch axis for a batch of one; weight
    `(C_in, C_out / groups, *kernel_size)`. Patches are added up where they overlap in the output,
    so `d_in = C_in / groups` and `d_out = C_out / groups · K1 · K2 ...`. The rows `B` are patches
    of the output's gradient, as in the convolution whose transpose this is. A bias is added once to
    each output pixel, so it is no column of the matrix.

    Channel groups are separate layers: with `groups > 1` rows and matrix have a leading axis.

    Args:
        kernel_size: One entry for each spatial axis.
        stride: A number, or one for each spatial axis.
        padding: A number, or one for each spatial axis.
        dilation: A number, or one for each spatial axis.
        groups: The number of channel groups.

    Raises:
        ValueError: If an argument has another value than these.

    Example:
        >>> import numpy as np
        >>> layer = TransposedConvolution((2, 2), stride=2)
        >>> A, N = layer.inputs(np.ones((8, 4, 5, 5)), bias=False, kfac_approx="expand")
        >>> B, M = layer.outputs(
        ...     np.ones((8, 3, 10, 10)), kfac_approx="expand", loss_average="batch"
        ... )
        >>> A.shape, N, B.shape, M
        ((200, 4), 200, (200, 12), 8)
    """

    kernel_size: Sequence[int] = field(compare=False)
    stride: Size = field(default=1, compare=False)
    padding: Size = field(default=0, compare=False)
    dilation: Size = field(default=1, compare=False)
    groups: int = field(default=1, compare=False)
    convolution: Convolution = field(init=False, repr=False)

    def __post_init__(self) -> None:
        padding: Any = self.padding
        if isinstance(padding, str):
            raise ValueError(f"padding = {padding!r}: give numbers")
        of = Convolution(self.kernel_size, self.stride, padding, self.dilation, self.groups)
        object.__setattr__(self, "convolution", of)

    @property
    def overlap(self) -> float:
        """That many patches are added up in a pixel of the output."""
        return self.convolution.overlap

    def inputs(
        self, x: Array, *, bias: bool, kfac_approx: str, sample: Sample | None = None
    ) -> tuple[Array, int]:
        """The rows `A`, shape `([groups,] N, d_in)`, of `(batch, C_in, *spatial)`; and `N`.

        Raises:
            ValueError: If there is to be a bias, or as for every kind.
        """
        _refuse(bias)
        A, _ = self.convolution.outputs(
            x, kfac_approx=kfac_approx, loss_average=None, sample=sample
        )
        batch, positions = self._lengths(x)
        if is_expand(kfac_approx):
            return A, batch * positions
        return A / positions, batch  # a mean where gradients are summed up

    def outputs(
        self,
        g: Array,
        *,
        kfac_approx: str,
        loss_average: str | int | None,
        sample: Sample | None = None,
    ) -> tuple[Array, int]:
        """The rows `B`, shape `([groups,] N, d_out)`, of `(batch, C_out, *pixels)`; and `M`.

        The shared positions of the loss are the positions of the input.
        """
        B, _ = self.convolution.inputs(g, bias=False, kfac_approx=kfac_approx, sample=sample)
        batch, _ = self._lengths(g)
        windows = self.convolution.windows
        pixels = g.shape[g.ndim - len(windows) :]
        shared = [window.positions(n) for window, n in zip(windows, pixels, strict=True)]
        M = loss_terms(loss_average, batch, shared)
        return (B if is_expand(kfac_approx) else B * prod(shared)), M

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The weight `(C_in, C_out / groups, *kernel_size)` as a matrix; it takes no bias."""
        _refuse(bias is not None)
        return self.convolution.matrix(weight).mT

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """A view of the weight, of shape `weight_shape`."""
        return self.convolution.split(matrix.mT, weight_shape, False)

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[Shape, int, int]:
        """`((groups,), d_out, C_in / groups)`, `((), d_out, C_in)` without."""
        _refuse(bias)
        groups, d_in, d_out = self.convolution.shape(weight_shape, False)
        return groups, d_out, d_in

    def check_weight(self, weight_shape: Sequence[int], bias: bool) -> None:
        """Refuse also a kernel of another size."""
        super().check_weight(weight_shape, bias)
        check_kernel(self, self.convolution.windows, weight_shape)

    def of_call(self, kind: LayerKind) -> LayerKind | None:
        """The same transposed convolution."""
        return kind if self == kind else None

    def has_rows_along(self, axis: int) -> bool | None:
        """Input channels, along the first axis, are columns; with groups no axis has either."""
        return {0: False, 1: True}.get(axis) if self.groups == 1 else None

    def _lengths(self, x: Array) -> tuple[int, int]:
        """The batch and the number of entries of the spatial axes."""
        axes = len(self.convolution.windows)
        return (x.shape[0] if x.ndim == axes + 2 else 1), prod(x.shape[x.ndim - axes :])


def _refuse(bias: bool) -> None:
    if bias:
        raise ValueError(
            "the bias of a transposed convolution is no column of its matrix: give the bias a name "
            "of its own"
        )
