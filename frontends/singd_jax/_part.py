"""Where a matrix lies in the leaves of the parameters, and how it is read and written there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp

from singd_core._array import Array
from singd_core.layers.base import WithoutRows
from singd_jax._axes import Group, Region, size


@dataclasses.dataclass(frozen=True)
class Part:
    """A region of a parameter leaf, as a matrix or a stack of matrices.

    Attributes:
        name: The name of the leaf.
        shape: Its shape.
        region: Where the matrix lies in it.
        flips: Axes that are reversed.
        stack: The axes of a stack.
        outs: The atoms of the matrix's rows.
        ins: The atoms of its columns.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    flips: frozenset[int]
    stack: tuple[Group, ...]
    outs: Group
    ins: Group

    @classmethod
    def of_leaf(
        cls,
        name: str,
        shape: tuple[int, ...],
        stack: tuple[Group, ...],
        outs: Group,
        ins: Group = (),
    ) -> Self:
        """A whole leaf."""
        return cls(name, shape, tuple((0, n) for n in shape), frozenset(), stack, outs, ins)

    @property
    def matrix_of(self) -> tuple[str, Region]:
        """What tells the matrices of a leaf apart that are taken by an index, as by a loop."""
        lengths = zip(self.region, self.shape, strict=True)
        return self.name, self.region if any(n == 1 < full for (_, n), full in lengths) else ()

    @property
    def numbers(self) -> int:
        """How many entries it has."""
        return size((*(atom for group in self.stack for atom in group), *self.outs, *self.ins))

    @property
    def whole(self) -> bool:
        """Whether it is the whole leaf."""
        return self.region == tuple((0, n) for n in self.shape)

    @property
    def is_in_order(self) -> bool:
        """Whether its matrix is the region in another shape."""
        _, order = self._order()
        return not self.flips and order == sorted(order)

    @property
    def layout(self) -> tuple[Any, ...]:
        """How it lies in its region: products of the same layout are uses of one matrix."""
        return self.stack, self.outs, self.ins, self.flips

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape (*stack, d_out, d_in)."""
        return (*map(size, self.stack), size(self.outs), size(self.ins))

    def take(self, leaf: Array) -> Array:
        """The region, in the leaf's own axes."""
        return leaf if self.whole else leaf[self._slices()]

    def put(self, leaf: Array, region: Array) -> Array:
        """The leaf with the region in it."""
        region = region.astype(leaf.dtype)
        return region if self.whole else leaf.at[self._slices()].set(region)

    def matrix(self, region: Array) -> Array:
        """The matrix, shape (*stack, d_out, d_in), of the region."""
        x = jnp.flip(region, sorted(self.flips)) if self.flips else region
        have, order = self._order()
        x = jnp.transpose(x.reshape([n for *_, n in have]), order)
        return x.reshape(self.matrix_shape)

    def of_matrix(self, matrix: Array) -> Array:
        """The region of the matrix: the inverse of `matrix`."""
        have, order = self._order()
        x = matrix.reshape([have[i][2] for i in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        x = jnp.transpose(x, back).reshape([n for _, n in self.region])
        return jnp.flip(x, sorted(self.flips)) if self.flips else x

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + n) for start, n in self.region)

    def _order(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """The atoms as they lie in the leaf, and where the matrix wants them."""
        want = [*(atom for group in self.stack for atom in group), *self.outs, *self.ins]
        have = sorted(want, key=lambda atom: (atom[0], -atom[1]))
        return have, [have.index(atom) for atom in want]


def padded(matrix: Array) -> Array:
    """A matrix, or rows of K, with a column of zeros for the bias."""
    return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, 1)])


@dataclasses.dataclass(frozen=True)
class Laid(WithoutRows):
    """How the regions of a weight and of its bias, in their leaves' own axes, are a matrix.

    It makes no rows: those come from the products that the loss is traced for.

    Attributes:
        weight: Where the matrix W lies.
        bias: Where its last column lies, or None.
        overlap: In how many rows an entry of the layer's input takes part.
    """

    weight: Part
    bias: Part | None
    overlap: float = 1.0

    def matrix(self, weight: Array, bias: Array | None = None) -> Array:
        """The matrix (*stack, d_out, d_in [+ 1]) of the regions, or of their gradients."""
        matrix = self.weight.matrix(weight)
        if bias is None or self.bias is None:
            return matrix
        # written into one array: XLA would compile a concatenation again for each equal layer
        wide = padded(matrix)
        return wide.at[..., -1:].set(self.bias.matrix(bias).astype(wide.dtype))

    def split(
        self, matrix: Array, weight_shape: Sequence[int], bias: bool
    ) -> tuple[Array, Array | None]:
        """The regions of the matrix."""
        if not bias or self.bias is None:
            return self.weight.of_matrix(matrix), None
        return self.weight.of_matrix(matrix[..., :-1]), self.bias.of_matrix(matrix[..., -1])

    def shape(self, weight_shape: Sequence[int], bias: bool) -> tuple[tuple[int, ...], int, int]:
        """The stack, d_out and d_in [+ 1]."""
        *stack, d_out, d_in = self.weight.matrix_shape
        return tuple(stack), d_out, d_in + (bias and self.bias is not None)
