"""Where the axes of a value come from, when it is a rearranged parameter.

An axis is a group of atoms `(axis of the leaf, stride, size)`: it splits and merges by reshapes,
moves by transposes. Head splits, channel groups and stacks of layers all become such groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

Atom: TypeAlias = tuple[int, int, int]
Group: TypeAlias = tuple[Atom, ...]
Region: TypeAlias = tuple[tuple[int, int], ...]  # (start, size) along each axis of a leaf
Key: TypeAlias = tuple[int, Region]  # the leaf and the region of a weight

# Equations that change neither the shape nor which entry is where.
KEEPS = {
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
}


# Equations whose result has the entries of their operand, and no others.
REARRANGES = {*KEEPS, "broadcast_in_dim", "reshape", "squeeze", "transpose"}


def coarsest(*dtypes: Any) -> Any:
    """The dtype of floating-point numbers that rounds most, None if there is none.

    None among the dtypes is none.
    """
    smooth = [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
    return max(smooth, key=eps, default=None)


def eps(dtype: Any) -> float:
    """The distance between 1 and the next number."""
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def size(group: Group) -> int:
    """The length of an axis."""
    return math.prod(n for *_, n in group)


def axes_of(shape: Sequence[int]) -> tuple[Group, ...]:
    """The axes of a value itself; an axis of length 1 has no atoms."""
    return tuple(((d, 1, n),) if n != 1 else () for d, n in enumerate(shape))


def merged(atoms: Sequence[Atom]) -> Group:
    """The atoms with neighbours joined that lie next to each other in the leaf."""
    out: list[Atom] = []
    for d, stride, n in atoms:
        if out and out[-1][0] == d and out[-1][1] == stride * n:
            out[-1] = (d, stride, out[-1][2] * n)
        else:
            out.append((d, stride, n))
    return tuple(out)


def reshaped(dims: Sequence[Group], shape: Sequence[int]) -> tuple[Group, ...] | None:
    """The axes after a reshape, or None if it cuts an atom in two unevenly or has no entries."""
    if 0 in shape:
        return None
    atoms, out = [atom for group in dims for atom in group], []
    for n in shape:
        group: list[Atom] = []
        while n > 1:
            if not atoms:
                return None
            d, stride, m = atoms.pop(0)
            if n % m == 0:
                group.append((d, stride, m))
                n //= m
            elif m % n == 0:
                group.append((d, stride * (m // n), n))
                atoms.insert(0, (d, stride, m // n))
                n = 1
            else:
                return None
        out.append(merged(group))
    return None if atoms else tuple(out)


def rearranged(name: str, p: Mapping[str, Any], dims: tuple[Group, ...]) -> Any:
    """The axes after an equation that only rearranges its first operand, else None."""
    if name in KEEPS:
        return dims
    if name == "transpose":
        return tuple(dims[i] for i in p["permutation"])
    if name == "squeeze":
        return tuple(group for i, group in enumerate(dims) if i not in p["dimensions"])
    if name == "reshape":
        order = p.get("dimensions")  # a reshape may transpose first
        return reshaped(dims if order is None else [dims[i] for i in order], p["new_sizes"])
    if name == "broadcast_in_dim":
        source = dict(zip(p["broadcast_dimensions"], dims, strict=True))
        return tuple(source.get(i, ()) for i in range(len(p["shape"])))
    return None


def restored(name: str, p: Mapping[str, Any], dims: Sequence[Group], shape: Sequence[int]) -> Any:
    """The axes of an operand of that shape from those that `rearranged` makes of them, or None."""
    if name in KEEPS:
        return tuple(dims)
    if name == "transpose":
        return tuple(dims[p["permutation"].index(i)] for i in range(len(dims)))
    if name == "broadcast_in_dim":
        kept = p["broadcast_dimensions"]
        rest = [n for i, n in enumerate(p["shape"]) if i not in kept]
        same = [p["shape"][i] for i in kept] == list(shape)
        return tuple(dims[i] for i in kept) if same and set(rest) <= {1} else None
    if name == "squeeze" or (name == "reshape" and p.get("dimensions") is None):
        return reshaped(dims, shape)
    return None


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a rearranged region of a parameter leaf.

    Attributes:
        leaf: The number of the leaf.
        region: The region, along each axis of the leaf.
        dims: The value's axes, as atoms of the region.
        stack: Axes that enclosing scans have taken one index of.
        scans: Which scans those are.
        flips: Axes of the leaf that are reversed.
        factor: A number that it is multiplied by, or None.
        picks: The index and the length of each axis from which one index was taken at run time.
        rounded: The coarsest dtype that it was cast to, or None.
    """

    leaf: int
    region: Region
    dims: tuple[Group, ...]
    stack: tuple[Group, ...] = ()
    scans: tuple[Any, ...] = ()
    flips: frozenset[int] = frozenset()
    factor: Any = dataclasses.field(default=None, compare=False)
    picks: tuple[tuple[Any, int], ...] = dataclasses.field(default=(), compare=False)
    rounded: Any = dataclasses.field(default=None, compare=False)

    @classmethod
    def of_leaf(cls, leaf: int, shape: Sequence[int]) -> View:
        """A whole leaf."""
        return cls(leaf, tuple((0, n) for n in shape), axes_of(shape))

    @property
    def key(self) -> Key:
        """Which weight it is."""
        return self.leaf, self.region

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of its axes."""
        return tuple(size(group) for group in self.dims)

    def holds(self, key: Key) -> bool:
        """Whether a weight lies in it."""
        leaf, region = key
        spans = zip(region, self.region, strict=False)
        return leaf == self.leaf and all(a >= b and a + n <= b + m for (a, n), (b, m) in spans)

    def apply(self, name: str, params: Mapping[str, Any]) -> View | None:
        """The view after an equation that rearranges it, else None."""
        if name == "slice":
            return self._sliced(params)
        if name == "rev":
            return self._reversed(params["dimensions"])
        dims, rounded = rearranged(name, params, self.dims), self.rounded
        if name == "convert_element_type":
            rounded = coarsest(params["new_dtype"], rounded)
        return None if dims is None else dataclasses.replace(self, dims=dims, rounded=rounded)

    def narrow(self, axis: int, start: int, length: int) -> View | None:
        """The view of some entries of an axis, if they are a region of the leaf, else None."""
        group = self.dims[axis]
        if start == 0 and length == size(group):
            return self
        if not group or not length:
            return None
        (d, stride, n), *rest = group
        inner = size(tuple(rest))
        offset, outer = self.region[d]
        # Whole steps of the outermost atom of a leaf's axis are one piece of it.
        if start % inner or length % inner or stride * n != outer or d in self.flips:
            return None
        first, count = start // inner, length // inner
        region = list(self.region)
        region[d] = (offset + first * stride, count * stride)
        kept = [(d, stride, count)] if count > 1 else []
        dims = list(self.dims)
        dims[axis] = (*kept, *rest)
        return dataclasses.replace(self, region=tuple(region), dims=tuple(dims))

    def split(self, axis: int, sizes: Sequence[int]) -> list[View | None]:
        """The views of pieces of an axis, of these sizes one after the other; None as above."""
        starts = itertools.accumulate(sizes, initial=0)
        return [self.narrow(axis, start, n) for start, n in zip(starts, sizes, strict=False)]

    def times(self, factor: Any) -> View:
        """The view multiplied by a number."""
        factor = factor if self.factor is None else self.factor * factor
        return dataclasses.replace(self, factor=factor)

    def pick(self, starts: Sequence[Any], sizes: Sequence[int]) -> View | None:
        """The view of one index of an axis that is known only at run time, else None."""
        picked = [axis for axis, n in enumerate(self.shape) if sizes[axis] != n]
        if len(picked) != 1 or sizes[picked[0]] != 1:
            return None
        (axis,), dims = picked, list(self.dims)
        pick = starts[axis], size(dims[axis])
        stack, dims[axis] = (*self.stack, dims[axis]), ()
        picks = (*self.picks, pick)
        return dataclasses.replace(self, stack=stack, picks=picks, dims=tuple(dims))

    def cut(self, starts: Sequence[Any], sizes: Sequence[int]) -> View | None:
        """The view of a slice that starts there, as dynamic_slice moves it; None as above."""
        each = zip(starts, sizes, self.shape, strict=True)
        return self._part([(min(max(int(i), 0), n - length), length) for i, length, n in each])

    def enter_scan(self, scan: Any) -> View:
        """The view of one index of the first axis, inside a scan over it."""
        stack = (*self.stack, self.dims[0])
        return dataclasses.replace(self, stack=stack, scans=(*self.scans, scan), dims=self.dims[1:])

    def _sliced(self, params: Mapping[str, Any]) -> View | None:
        if params.get("strides") is not None and any(s != 1 for s in params["strides"]):
            return None
        ends = zip(params["start_indices"], params["limit_indices"], strict=True)
        return self._part([(start, stop - start) for start, stop in ends])

    def _part(self, spans: Sequence[tuple[int, int]]) -> View | None:
        """The view of some entries of each axis, by the first and how many; None as above."""
        view: View | None = self
        for axis, (start, length) in enumerate(spans):
            view = None if view is None else view.narrow(axis, start, length)
        return view

    def _reversed(self, dimensions: Sequence[int]) -> View | None:
        flips = set(self.flips)
        for axis in dimensions:
            group = self.dims[axis]
            if len(group) != 1 or group[0][1:] != (1, self.region[group[0][0]][1]):
                return None
            flips ^= {group[0][0]}
        return dataclasses.replace(self, flips=frozenset(flips))
