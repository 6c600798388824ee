"""One layer of a loss: the matrix that a parameter is, with its bias, and how it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self, TypeAlias

from singd_core import rules
from singd_core._array import Array
from singd_core._layer_state import Parameter, parts
from singd_core._settings import Settings
from singd_core.layers import Tensor
from singd_core.layers.biases import biases
from singd_core.structures import Structure, choose
from singd_jax._calls import Call
from singd_jax._part import Laid, Part

# As what a product uses a matrix, which is what its curvature has after the name of the layer.
Role: TypeAlias = str
UPRIGHT, TRANSPOSED = "", " transposed"

# Two names or classes, "auto:b", or None for what fits each weight; see choose.resolve.
Wanted: TypeAlias = choose.Structures | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight, with its bias if it has one, that multiplies data.

    Attributes:
        name: The name of the weight in the parameters.
        kind: What kind of product it is used in.
        weight: Where the matrix W lies.
        bias: Where its last column lies, or None.
        uses: The number of products of the loss that use it.
        transposed: The number of these that use its transpose, such as the last layer of a tied
            table of embeddings.
        diagonal: Which of "K" and "C" are always diagonal, because rows are one-hot.
        elsewhere: Other uses of its parameters, which its curvature does not contain.
        notes: Further remarks for the table.
        has_rows: Whether products show its rows. Otherwise it learns from gradients alone.
        overlap: The number of rows of a product in which an entry of its input takes part.
        in_turn: How many of its matrices are used one after the other, as scans take them.
        rows: The number of rows of all products, in the batch with which it was found.
        runs: How often a product runs.
    """

    name: str
    kind: str
    weight: Part
    bias: Part | None = None
    uses: int = 1
    transposed: int = 0
    diagonal: str = ""
    elsewhere: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    has_rows: bool = True
    overlap: float = 1.0
    in_turn: int = 1
    # what another batch size changes, and nothing else: layers are equal all the same
    rows: int = dataclasses.field(default=0, compare=False)
    runs: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def tensor(
        cls, name: str, shape: tuple[int, ...], bias: str = "", kind: Tensor | None = None
    ) -> Self:
        """A leaf that shows no rows, as a matrix or as a stack of matrices.

        With a `bias`, `kind` says how the leaf is a matrix.
        """
        kind = kind or Tensor.of(shape)
        axes, first = tuple((i, 1, n) for i, n in enumerate(shape)), kind.stack
        middle = first + (kind.ins if kind.transposed else kind.outs)
        outs, ins = axes[first:middle], axes[middle:]
        outs, ins = (ins, outs) if kind.transposed else (outs, ins)
        stack = tuple((axis,) for axis in axes[:first])
        weight = Part.of_leaf(name, shape, stack, outs, ins)
        if not bias:
            return cls(name, "no rows", weight, has_rows=False)
        lengths = (*shape[:first], *(n for *_, n in outs))
        own = tuple((i, 1, n) for i, n in enumerate(lengths))
        of_bias = Part.of_leaf(bias, lengths, tuple((axis,) for axis in own[:first]), own[first:])
        return cls(name, "no rows", weight, of_bias, has_rows=False)

    @classmethod
    def tensors(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Self]:
        """The leaves that are matrices, by name, with the biases that names and shapes tell."""
        with_bias = {weight: (bias, kind) for weight, bias, kind in biases(shapes)}
        taken = {bias for bias, _ in with_bias.values()}
        return {
            name: cls.tensor(name, shape, *with_bias.get(name, ()))
            for name, shape in shapes.items()
            if name in with_bias or (Tensor.fits(shape) and name not in taken)
        }

    @property
    def parts(self) -> tuple[Part, ...]:
        """Where its weight lies, and where its bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that it is made of."""
        return tuple(part.name for part in self.parts)

    @property
    def laid(self) -> Laid:
        """How its parameter is a matrix; the same for equal layers.

        Without rows a bias is no column.
        """
        bias = self.bias if self.has_rows else None
        bias = None if bias is None else dataclasses.replace(bias, name="")
        return Laid(dataclasses.replace(self.weight, name=""), bias, self.overlap)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The stack, d_out and d_in of the matrix, the bias counted in."""
        return self.laid.shape(self.weight.shape, self.bias is not None)

    @property
    def roles(self) -> tuple[Role, ...]:
        """As what it is used in products that show rows."""
        if not self.has_rows:
            return ()
        return (UPRIGHT, TRANSPOSED) if self.transposed else (UPRIGHT,)

    def role(self, call: Call) -> Role | None:
        """As what a product uses it, None if as another matrix."""
        # a matrix 1×1 is upright, though its transpose has the same layout
        layouts = {call.transposed: TRANSPOSED, call.layout: UPRIGHT}
        role = layouts.get(self.weight.layout)
        return role if role in self.roles else None

    def without_bias(self) -> Layer:
        """The layer of the weight alone, where the bias is trained by another transformation."""
        return dataclasses.replace(self, bias=None)

    def learning(self, wanted: Wanted, s: Settings) -> Layer:
        """The layer without its rows, where factors of these structures learn from gradients.

        Tables of embeddings keep their rows, and so do vectors and layers to one output, which have
        a factor with nothing to learn.
        """
        _, d_out, d_in = self.shape
        stays = not self.has_rows or self.transposed or self.diagonal or 1 in (d_out, d_in)
        stays = stays or (self.bias is not None and not self.bias.is_in_order)
        if stays or rules.wants_rows(s, self.structures(wanted, rules.get(s.rule))):
            return self
        notes = *self.notes, rules.BY_CHOICE
        return dataclasses.replace(self, has_rows=False, overlap=1.0, notes=notes)

    def of(self, factors: rules.Factors) -> Layer:
        """The layer that the factors are of: with its bias only if they have a column for it."""
        K, _ = factors.sides
        fits = K.shape[-1] == self.shape[-1]
        if not self.has_rows:
            fits = rules.inputs_of(factors) is not None
        return self if fits else self.without_bias()

    def parameter(self, leaves: Mapping[str, Array]) -> Parameter:
        """The regions of the leaves, or of their gradients, in their own axes: what is trained."""
        found = tuple(part.take(leaves[part.name]) for part in self.parts)
        return found[0] if self.bias is None else found

    def matrix(self, leaves: Mapping[str, Array]) -> Array:
        """The matrix (*stack, d_out, d_in) of the leaves, or of their gradients."""
        return self.laid.matrix(*parts(self.parameter(leaves)))

    def put(self, leaves: Mapping[str, Array], parameter: Parameter) -> dict[str, Array]:
        """The leaves with the regions in them: the inverse of `parameter`."""
        pairs = zip(self.parts, parts(parameter), strict=True)
        return {part.name: part.put(leaves[part.name], region) for part, region in pairs}

    def structures(
        self, wanted: Wanted, rule: type[rules.Rule]
    ) -> tuple[type[Structure], type[Structure]]:
        """The structures of K and of C: what was asked for, or diagonal where it must be."""
        diagonal = "K" in self.diagonal, "C" in self.diagonal
        return rule.choose(wanted, self.shape, diagonal=diagonal, by_rows=self.has_rows)
