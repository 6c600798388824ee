"""The layers of a loss: which parameters form them, and the table that `print(layers)` shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax.numpy as jnp

from singd_core import preconditioner
from singd_core._array import Array
from singd_core.curvature.base import append_bias
from singd_core.structures import Diagonal, Structure
from singd_core.updates.kfac import KFAC
from singd_jax._axes import Group, Region, size
from singd_jax._calls import Call

if TYPE_CHECKING:
    from singd_jax._state import SingdState

# As what a product uses a matrix, which is what its curvature has after the name of the layer.
Role: TypeAlias = str
UPRIGHT, TRANSPOSED = "", " transposed"

# Two names or classes, "auto:b", or None for what fits each weight; see preconditioner.resolve.
Wanted: TypeAlias = preconditioner.Structures | str | None


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
        ins: Those of its columns.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    flips: frozenset[int]
    stack: tuple[Group, ...]
    outs: Group
    ins: Group

    @property
    def numbers(self) -> int:
        """How many entries it has."""
        return size((*(atom for group in self.stack for atom in group), *self.outs, *self.ins))

    @property
    def whole(self) -> bool:
        """Whether it is the whole leaf."""
        return self.region == tuple((0, n) for n in self.shape)

    @property
    def layout(self) -> tuple[Any, ...]:
        """How it lies in its region: products of the same layout are uses of one matrix."""
        return self.stack, self.outs, self.ins, self.flips

    def take(self, leaf: Array) -> Array:
        """The matrix, shape (*stack, d_out, d_in)."""
        x = leaf if self.whole else leaf[self._slices()]
        x = jnp.flip(x, sorted(self.flips)) if self.flips else x
        have, order = self._order()
        x = jnp.transpose(x.reshape([n for *_, n in have]), order)
        return x.reshape(*map(size, self.stack), size(self.outs), size(self.ins))

    def put(self, leaf: Array, matrix: Array) -> Array:
        """The leaf with the matrix in it."""
        have, order = self._order()
        x = matrix.astype(leaf.dtype).reshape([have[i][2] for i in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        x = jnp.transpose(x, back).reshape([n for _, n in self.region])
        x = jnp.flip(x, sorted(self.flips)) if self.flips else x
        return x if self.whole else leaf.at[self._slices()].set(x)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + n) for start, n in self.region)

    def _order(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """The atoms as they lie in the leaf, and where the matrix wants them."""
        want = [*(atom for group in self.stack for atom in group), *self.outs, *self.ins]
        have = sorted(want, key=lambda atom: (atom[0], -atom[1]))
        return have, [have.index(atom) for atom in want]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight, with its bias if it has one, that multiplies data.

    Attributes:
        name: The name of the weight in the parameters.
        kind: What kind of product it is used in.
        weight: Where the matrix W lies.
        bias: Where its last column lies, or None.
        uses: In how many products of the loss.
        transposed: In how many as its transpose, like a table of embeddings tied to the last layer.
        diagonal: Which of "K" and "C" are diagonal whatever is asked for, as one-hot rows want.
        elsewhere: How its parameters are read besides, which its curvature does not see.
        notes: What else is to be known of it.
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

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that it is made of."""
        return (self.weight.name,) if self.bias is None else (self.weight.name, self.bias.name)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The stack, d_out and d_in of the matrix, the bias counted in."""
        w = self.weight
        return tuple(map(size, w.stack)), size(w.outs), size(w.ins) + (self.bias is not None)

    @property
    def roles(self) -> tuple[Role, ...]:
        """As what it is used."""
        return (UPRIGHT, TRANSPOSED) if self.transposed else (UPRIGHT,)

    def role(self, call: Call) -> Role | None:
        """As what a product uses it, None if as another matrix."""
        layouts = {call.layout: UPRIGHT, call.transposed: TRANSPOSED}
        role = layouts.get(self.weight.layout)
        return role if role in self.roles else None

    def without_bias(self) -> Layer:
        """The layer of the weight alone, where the bias is trained by another transformation."""
        return dataclasses.replace(self, bias=None)

    def of(self, factors: preconditioner.Factors) -> Layer:
        """The layer that the factors are of: with its bias only if they have a column for it."""
        K = factors.S_K if isinstance(factors, KFAC) else factors.K
        return self if K.shape[-1] == self.shape[-1] else self.without_bias()

    def matrix(self, leaves: Mapping[str, Array]) -> Array:
        """The matrix (*stack, d_out, d_in) of the leaves, or of their gradients."""
        weight = self.weight.take(leaves[self.weight.name])
        if self.bias is None:
            return weight
        return append_bias(weight, self.bias.take(leaves[self.bias.name])[..., 0])

    def put(self, leaves: Mapping[str, Array], matrix: Array) -> dict[str, Array]:
        """The leaves with the matrix in them: the inverse of `matrix`."""
        if self.bias is None:
            return {self.weight.name: self.weight.put(leaves[self.weight.name], matrix)}
        return {
            self.weight.name: self.weight.put(leaves[self.weight.name], matrix[..., :-1]),
            self.bias.name: self.bias.put(leaves[self.bias.name], matrix[..., -1]),
        }

    def structures(self, wanted: Wanted, *, kfac: bool) -> tuple[type[Structure], type[Structure]]:
        """Those of K and of C: what was asked for, or diagonal where it must be."""
        K, C = preconditioner.resolve(wanted, self.shape, kfac=kfac)
        return (
            Diagonal if "K" in self.diagonal else K,
            Diagonal if "C" in self.diagonal else C,
        )


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers of a loss by name, and why the other parameters belong to none.

    Attributes:
        found: The layers.
        others: For each other parameter the reason; a Python number is none of the following.
        shapes: The shape of each parameter.
        itemsizes: The bytes of one number of the factors of each parameter.
        structures: Of K and C, unless the optimizer is told others; None takes what fits each.
        kfac_approx: "expand" or "reduce".
        loss_average: What the loss is a mean of.
        batch_size: The batch size, a function of the batch that returns it, or None to read it off
            the batch's first axis.
    """

    found: dict[str, Layer]
    others: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    itemsizes: dict[str, int]
    structures: Wanted
    kfac_approx: str
    loss_average: str | None
    batch_size: Any = None

    def __getitem__(self, name: str) -> Layer:
        """The layer of a name."""
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.found)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.found)

    def __hash__(self) -> int:
        """Equal layers are one static argument of a compiled step."""
        return hash((*self.found.items(), self.kfac_approx, self.loss_average))

    @property
    def numbers(self) -> list[str]:
        """The parameters that are Python numbers, and so are not trained."""
        return [name for name in self.others if name not in self.shapes]

    def of(self, states: Iterable[SingdState]) -> Layers:
        """Those that states train, as they train them."""
        trained = {
            name: self[name].of(layer.factors)
            for own in states
            for name, layer in own.core.layers.items()
            if name in self
        }
        return dataclasses.replace(self, found=trained)

    @property
    def curvatures(self) -> dict[str, tuple[str, Role]]:
        """The layer and the role that each key of a curvature stands for."""
        return {name + role: (name, role) for name, layer in self.items() for role in layer.roles}

    def refuse_others(
        self, arrays: Mapping[str, Array], needed: Iterable[str], what: str = "parameters"
    ) -> None:
        """Raise unless the needed leaves are there, and all in the shapes that were found.

        Raises:
            ValueError: Naming the first leaf that is missing or of another shape.
        """
        for name in needed:
            if name not in arrays:
                raise ValueError(
                    f"the {what} have no {name!r}, which the layers were found with: find the "
                    "layers of these parameters, or leave some out by a mask (optax.masked)"
                )
        for name, array in arrays.items():
            shape = self.shapes.get(name)
            if shape is not None and tuple(array.shape) != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(array.shape)} among the {what}, and had {shape} "
                    "when the layers were found: find the layers of these parameters"
                )

    def __repr__(self) -> str:
        """A row for each layer and each other parameter."""
        return self.table()

    __str__ = __repr__

    def table(self, structures: Any = None) -> str:
        """Which parameters form layers, of which kind and structures, or why they do not.

        Args:
            structures: Of K and C, in place of those that the layers know.
        """
        wanted = self.structures if structures is None else pair(structures)
        header = ("parameter", "shape", "kind", "matrix", "K", "C", "bytes of factors", "")
        body: list[tuple[str, ...]] = [header]
        for layer in self.found.values():
            body.append(self._row(layer, wanted))
        for name, reason in self.others.items():
            trained = (_times(self.shapes[name]), "AdamW") if name in self.shapes else ("", "")
            body.append((name, *trained, "", "", "", "", reason))
        return _render(body)

    def _row(self, layer: Layer, wanted: Wanted) -> tuple[str, ...]:
        (stack, d_out, d_in), itemsize = layer.shape, self.itemsizes[layer.weight.name]
        K, C = layer.structures(wanted, kfac=False)
        count = 1
        for n in stack:
            count *= n
        total = count * itemsize * (K.numbers(d_in) + C.numbers(d_out))
        bias = "" if layer.bias is None else f" + {_short(layer.bias.name)}"
        matrix = _times((d_out, d_in)) if not stack else f"{_times(stack)} of {d_out}×{d_in}"
        notes = "; ".join([*(f"also {reason}" for reason in layer.elsewhere), *layer.notes])
        shape = _times(self.shapes[layer.weight.name])
        return layer.name + bias, shape, layer.kind, matrix, K.name, C.name, f"{total:,}", notes


def _short(name: str) -> str:
    """The last part of a name, unless it is the number of an entry of a list."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def pair(structures: Any) -> Wanted:
    """Two structures, from two or from one for both; "auto:b" and None as they are."""
    if structures is None or (isinstance(structures, str) and structures.startswith("auto:")):
        return structures
    if isinstance(structures, (str, type)):
        return (structures, structures)
    return tuple(structures)


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "1"


def _render(body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    lines = []
    for row in body:
        cells = [
            cell.rjust(width) if i == 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
