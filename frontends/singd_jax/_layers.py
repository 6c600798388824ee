"""The layers of a loss: which parameters form them, and the table that `print(layers)` shows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from singd_core import rules
from singd_core._array import Array
from singd_core._recipes import DEFAULT, STRUCTURES, settings
from singd_core._settings import Settings
from singd_core._table import rendered, times
from singd_jax._layer import Layer, Role, Wanted
from singd_jax._reasons import COMPLEX

_BYTES = "bytes of factors"


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers of a loss by name, and why the other parameters belong to none.

    Attributes:
        found: The layers.
        others: For each other parameter the reason. It also has parameters that are Python numbers;
            the next two attributes do not.
        shapes: The shape of each parameter.
        itemsizes: The bytes of one number of the factors of each parameter.
        structures: Of K and C, unless the optimizer is told others; None takes what fits each.
        kfac_approx: "expand" or "reduce".
        loss_average: What the loss is a mean of.
        batch_size: The batch size, a function of the batch that returns it, or None to read it off
            the batch's first axis.
        searched: Whether a loss was searched for them.
        vectors: Parameters of which each step of a scan reads one vector: they are no matrices.
    """

    found: dict[str, Layer]
    others: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    itemsizes: dict[str, int]
    structures: Wanted
    kfac_approx: str
    loss_average: str | int | None
    batch_size: Any = None
    searched: bool = True
    vectors: frozenset[str] = frozenset()

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
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((*self.found.items(), self.kfac_approx, self.loss_average))

    @property
    def numbers(self) -> list[str]:
        """The parameters that are Python numbers, and so are not trained."""
        return [name for name in self.others if name not in self.shapes]

    def of(self, factors: Mapping[str, rules.Factors]) -> Layers:
        """Those that show rows and have factors, as these train them."""
        trained = {
            name: self[name].of(own)
            for name, own in factors.items()
            if name in self and self[name].has_rows and own.has_rows
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
                    "layers of these parameters, or leave some out by a mask (optax.masked). With "
                    "nnx.Optimizer(..., wrt=...), find them in a loss of what "
                    "nnx.split(model, wrt, ...) gives first"
                )
        for name, array in arrays.items():
            shape = self.shapes.get(name)
            if shape is not None and tuple(array.shape) != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(array.shape)} among the {what}, and had {shape} "
                    "when the layers were found: find the layers of these parameters"
                )

    def refuse_further(self, arrays: Mapping[str, Array], known: Iterable[str]) -> None:
        """Raise if there is an array that is none of those known.

        Raises:
            ValueError: Naming the first.
        """
        for name in arrays:
            if name not in known and name in self.numbers:
                raise ValueError(
                    f"{name!r} was a Python number at the start, in find_layers or tx.init, which "
                    "is not trained: make it jnp.asarray(...) there"
                )
            if name not in known:
                raise ValueError(
                    f"{name!r} is none of the parameters that the layers were found with and that "
                    "tx.init was given: do both anew with these parameters"
                )

    def __repr__(self) -> str:
        """A row for each layer and each other parameter."""
        return self.table()

    __str__ = __repr__

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
        """Which leaves of these shapes, that belong to no layer, are matrices all the same."""
        found = Layer.tensors(shapes)
        return {k: v for k, v in found.items() if k not in self.vectors}

    def table(self, structures: Any = None, *, recipe: str = DEFAULT) -> str:
        """Which parameters form layers, with their kinds and structures, or why they do not.

        The bytes count K and C, and m_K and m_C if the recipe keeps them.

        Args:
            structures: Of K and C, in place of those that the layers know.
            recipe: What they will be trained with, "normalized" or "paper".
        """
        wanted = self.structures if structures is None else pair(structures)
        wanted, own = STRUCTURES[recipe] if wanted is None else wanted, settings(recipe)
        header = ("parameter", "shape", "kind", "matrix", "K", "C", _BYTES, "")
        body: list[tuple[str, ...]] = [header]
        for layer in self.found.values():
            body.append(self._row(layer.learning(wanted, own), wanted, own))
        real = {
            n: self.shapes[n]
            for n, why in self.others.items()
            if n in self.shapes and why != COMPLEX
        }
        tensors = self.tensors(real) if rules.learns_from_gradients(own) else {}
        biases = {layer.bias.name for layer in tensors.values() if layer.bias is not None}
        for name, reason in self.others.items():
            if name in tensors:
                layer = dataclasses.replace(tensors[name], notes=(reason,))
                body.append(self._row(layer, wanted, own))
            if name in tensors or name in biases:
                continue
            trained = (times(self.shapes[name]), "AdamW") if name in self.shapes else ("", "")
            body.append((name, *trained, "", "", "", "", reason))
        return rendered(body, _BYTES)

    def _row(self, layer: Layer, wanted: Wanted, s: Settings) -> tuple[str, ...]:
        (stack, d_out, d_in), itemsize = layer.shape, self.itemsizes[layer.weight.name]
        rule = rules.get(s.rule)
        K, C = layer.structures(wanted, rule)
        count = math.prod(stack) * (2 if rule.keeps_momentum(s) else 1)
        total = count * itemsize * (K.numbers(d_in) + C.numbers(d_out))
        bias = "" if layer.bias is None else f" + {_short(layer.bias.name)}"
        matrix = times((d_out, d_in)) if not stack else f"{times(stack)} of {d_out}×{d_in}"
        notes = "; ".join([*(f"also {reason}" for reason in layer.elsewhere), *layer.notes])
        shape = times(self.shapes[layer.weight.name])
        return layer.name + bias, shape, layer.kind, matrix, K.name, C.name, f"{total:,}", notes


def _short(name: str) -> str:
    """The last part of a name, unless it is the number of an entry of a list."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def checked(layers: Any) -> Layers:
    """The layers that were given.

    Raises:
        TypeError: If they are something else, such as what `find_layers` returns.
    """
    if isinstance(layers, Layers):
        return layers
    missing = "; the second call is missing" if callable(layers) else ""
    raise TypeError(
        "layers must be what singd_jax.find_layers(loss)(params, *batch) returns, not a "
        f"{type(layers).__name__}{missing}"
    )


def pair(structures: Any) -> Wanted:
    """Structures as they are given, two of them as a tuple."""
    return tuple(structures) if isinstance(structures, list) else structures
