"""Where a value comes from, and whether a parameter added to a layer's output is its bias."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

from singd_jax._axes import Atom, Group, Key, View, reshaped, size
from singd_jax._calls import Call, Cut
from singd_jax._joins import Join

Path: TypeAlias = tuple[int, ...]  # those it lies in, an equation, which product of it


@dataclasses.dataclass(frozen=True)
class Piece:
    """One product of a view, as part of the whole that a concatenation computes."""

    key: Key
    path: Path
    call: Call
    cut: Cut | None


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer's output, on its way to its bias; `dims` are atoms of its own axes."""

    pieces: tuple[Piece, ...]
    dims: tuple[Group, ...]

    def biases(self, added: View | Join) -> list[Bias] | None:
        """What is added to each piece, or None if it is no bias of all of them."""
        views = views_of(added)
        if len(views) != len(self.pieces):
            return None
        found = []
        whole = sum(piece.cut[2] for piece in self.pieces if piece.cut is not None)
        for piece, view in zip(self.pieces, views, strict=True):
            dims = self.dims
            if piece.cut is not None:  # its own part of the concatenated axis
                axis, _, n = piece.cut
                own: Group = ((axis, 1, n),)
                dims = tuple(own if group == ((axis, 1, whole),) else group for group in dims)
            bias = bias_of(piece.call, dims, view)
            if bias is None:
                return None
            found.append(bias)
        return found


Origin: TypeAlias = View | Join | Product | None  # where a value comes from


def views_of(*origins: Origin) -> tuple[View, ...]:
    """The views among origins, and those that are joined in them."""
    some = [o.views if isinstance(o, Join) else (o,) for o in origins]
    return tuple(v for views in some for v in views if isinstance(v, View))


@dataclasses.dataclass(frozen=True)
class Bias:
    """A view that is added to every row of a layer's output.

    Attributes:
        view: The view.
        stack: Its atoms along the layer's stack.
        outs: Its atoms in the order of the matrix's rows.
    """

    view: View
    stack: tuple[Group, ...]
    outs: tuple[Atom, ...]


_dicts: Any = functools.partial(collections.defaultdict, dict)


@dataclasses.dataclass
class Noted:
    """What is noted of the parameters of a loss, or of a call in it.

    Attributes:
        calls: The products found of each weight, by the path of their equations.
        biases: What was added to them.
        reads: For each leaf the other equations that read it.
        steps: The weights that every step of a scan that was entered multiplies with.
        vectors: The leaves of which a scan reads one vector in each step.
    """

    calls: dict[Key, dict[Path, Call]] = dataclasses.field(default_factory=_dicts)
    biases: dict[Key, dict[Path, Bias]] = dataclasses.field(default_factory=_dicts)
    reads: dict[int, dict[str, None]] = dataclasses.field(default_factory=_dicts)
    steps: set[Key] = dataclasses.field(default_factory=set)
    vectors: set[int] = dataclasses.field(default_factory=set)

    def update(self, other: Noted) -> None:
        """Note what another has besides."""
        mine, others = vars(self), vars(other)
        for name in ("calls", "biases", "reads"):
            for key, found in others[name].items():
                mine[name][key].update(found)
        self.steps |= other.steps
        self.vectors |= other.vectors


def bias_of(call: Call, dims: Sequence[Group], view: View) -> Bias | None:
    """The bias of a product, or None if the view is not one.

    Args:
        call: The product.
        dims: The axes of what the view is added to, as atoms of the product's axes.
        view: The view, with as many axes, of length 1 where it is repeated.
    """
    scanned = len(call.view.stack)
    same_scans = view.scans == call.view.scans
    same_stack = [*map(size, view.stack)] == [*map(size, call.view.stack)]
    if not (call.takes_bias and same_scans and same_stack and len(dims) == len(view.dims)):
        return None
    if view.factor is not None or view.picks or call.view.picks:
        return None
    units: list[Atom] = []  # those atoms of the product's axes that tell outputs apart
    for group, own in zip(dims, view.dims, strict=True):
        along = [atom for atom in group if call.along[atom[0]]]
        if size(own) != size(tuple(along)) or (along and len(along) != len(group)):
            return None
        units += along
    found = _of_units(call, units, view)
    if found is None:
        return None
    own_stack = call.stack[scanned:]
    try:
        stack = view.stack + tuple(tuple(_pick(found, group)) for group in own_stack)
        return Bias(view, stack, tuple(_pick(found, call.outs)))
    except KeyError:  # the layer's atoms were merged or split in another way
        return None


def _of_units(call: Call, units: list[Atom], view: View) -> dict[Atom, Group] | None:
    """For each atom of the weight that tells outputs apart, the atoms of the bias."""
    whole = [atom for group in view.dims for atom in group]
    split = reshaped((tuple(whole),), [n for *_, n in units])
    if split is None:
        return None
    order = sorted(range(len(units)), key=lambda i: (units[i][0], -units[i][1]))
    found: dict[Atom, Group] = {}
    for axis, wanted in enumerate(call.along):
        mine = tuple(atom for i in order if units[i][0] == axis for atom in split[i])
        parts = reshaped((mine,), [n for *_, n in wanted])
        if parts is None:
            return None
        found |= dict(zip(wanted, parts, strict=True))
    return found


def _pick(found: dict[Atom, Group], atoms: Sequence[Atom]) -> list[Atom]:
    return [atom for unit in atoms for atom in found[unit]]
