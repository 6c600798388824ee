"""Whether a parameter that is added to a layer's output is its bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from singd_jax._axes import Atom, Group, View, reshaped, size
from singd_jax._calls import Call


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
