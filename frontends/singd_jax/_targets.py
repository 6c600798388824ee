"""What the walk back through a backward pass carries and finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from singd_jax import _compat
from singd_jax._axes import REARRANGES, Group, Key, View
from singd_jax._calls import Call
from singd_jax._product import Path

# variables and constants, and whether they divide
Numbers: TypeAlias = tuple[tuple[Any, bool], ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """A value that, times numbers and summed along some axes, is the gradient of a view.

    The atoms of an axis that is summed belong to no axis of the leaf.

    Attributes:
        view: The view.
        numbers: Numbers of the same jaxpr.
        outer: Numbers of the jaxprs around it.
    """

    view: View
    numbers: Numbers = ()
    outer: Numbers = ()

    @property
    def shown(self) -> View:
        """The view that a value would be whose gradient this is, but for numbers of the jaxpr."""
        dims = [() if is_sum(group) else group for group in self.view.dims]
        view = dataclasses.replace(self.view, dims=tuple(dims))
        for number, divides in self.numbers:
            if isinstance(number, float):
                view = view.times(1.0 / number if divides else number)
        return view

    def of(self, dims: Sequence[Group]) -> Target:
        """The same with other axes."""
        return self.seen_as(dataclasses.replace(self.view, dims=tuple(dims)))

    def seen_as(self, view: View) -> Target:
        """The same of another view."""
        return dataclasses.replace(self, view=view)

    def times(self, number: Any, divides: bool = False) -> Target:
        """What, times a number besides, is the gradient."""
        return dataclasses.replace(self, numbers=(*self.numbers, (number, divides)))

    def renamed(self, names: Mapping[Any, Any]) -> Target:
        """The same with its numbers as other variables."""
        numbers = [(names.get(v, v), divides) for v, divides in self.numbers]
        return dataclasses.replace(self, numbers=tuple(numbers))

    @property
    def inside(self) -> Target:
        """The same in a jaxpr that an equation runs."""
        return Target(self.view, (), (*self.outer, *self.numbers))


Targets: TypeAlias = list[list[Target]]  # for each of several variables


@dataclasses.dataclass(frozen=True)
class Hit:
    """A product that makes a gradient.

    Attributes:
        eqn: Its equation.
        target: The view, as the product with x would have it.
        call: That product.
        x: The variable of the inputs.
        g: The variable of the gradients of the outputs, its axes in the order `order`.
        path: The equation, and those that it lies in.
    """

    eqn: Any
    target: Target
    call: Call
    x: Any
    g: Any
    order: tuple[int, ...]
    path: Path


@dataclasses.dataclass
class Plan:
    """The products of a jaxpr and of those that its equations run; numbers that these need."""

    hits: list[Hit] = dataclasses.field(default_factory=list)
    inner: dict[int, list[Plan]] = dataclasses.field(default_factory=dict)
    numbers: dict[int, dict[int, Numbers]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> set[Key]:
        """The weights."""
        own = {hit.target.view.key for hit in self.hits}
        return own.union(*(plan.keys for plans in self.inner.values() for plan in plans))

    def stacked(self, scan: int) -> set[Key]:
        """The stacks of weights from which each step of a scan takes one weight."""
        own = {hit.target.view.key for hit in self.hits if scan in hit.target.view.scans}
        inner = (plan for plans in self.inner.values() for plan in plans)
        return own.union(*(plan.stacked(scan) for plan in inner))


@dataclasses.dataclass(frozen=True)
class Level:
    """A jaxpr on the way: what is found in it, where it lies, and which equation makes what."""

    plan: Plan
    within: Path
    made_in: Mapping[Any, Any]


def entered(t: Target, scan: int) -> Target:
    """What each step of a scan puts together: a part of a stack, or of what is summed."""
    view = t.view
    return t.of(view.dims[1:]) if is_sum(view.dims[0]) else t.seen_as(view.enter_scan(scan))


def left_of(t: Target, scan: int, length: int) -> Target:
    """What a step of a scan takes of one of its operands, for the whole operand."""
    view = t.view
    if scan not in view.scans:
        return t.of([((-1 - len(view.dims), 1, length),), *view.dims])
    dims, stack, scans = (view.stack[-1], *view.dims), view.stack[:-1], view.scans[:-1]
    return t.seen_as(dataclasses.replace(view, dims=dims, stack=stack, scans=scans))


def are_outside(targets: Targets, given: Container[Any] = ()) -> bool:
    """Whether the numbers of a jaxpr are known outside: constants, and what it is given."""
    return all(
        isinstance(v, float) or v in given for some in targets for t in some for v, _ in t.numbers
    )


def is_sum(group: Group) -> bool:
    """Whether it is an axis along which a gradient is summed."""
    return bool(group) and all(axis < 0 for axis, *_ in group)


def is_zero(v: Any, made_in: Mapping[Any, Any]) -> bool:
    """Whether a variable holds the zeros that a sum begins with."""
    while not _compat.is_literal(v):
        eqn = made_in.get(v)
        if eqn is None or eqn.primitive.name not in REARRANGES or not eqn.invars:
            return False
        v = eqn.invars[0]
    return not np.any(v.val)


def number_of(v: Any, made_in: Mapping[Any, Any]) -> Any:
    """The variable of a number, which may have been broadcast, or its value if it is constant."""
    while not _compat.is_literal(v) and v.aval.shape != ():
        eqn = made_in.get(v)
        if eqn is None or eqn.primitive.name not in ("broadcast_in_dim", "reshape"):
            return v if v.aval.size == 1 else None
        v = eqn.invars[0]
    return float(v.val) if _compat.is_literal(v) else v


def needs(v: Any, eqn: Any, made_in: Mapping[Any, Any]) -> bool:
    """Whether a variable is computed from the results of an equation."""
    made = None if isinstance(v, float) or _compat.is_literal(v) else made_in.get(v)
    return made is not None and (made is eqn or any(needs(u, eqn, made_in) for u in made.invars))


def outer_product(eqn: Any, made_in: Mapping[Any, Any]) -> Any:
    """The operands of a product entry by entry of what repeats each of them along other axes.

    It is one of `dot_general` that contracts nothing: returned with that one's dimension numbers,
    and with the axes of the result in that one's order; None if it is something else.
    """
    shape = eqn.outvars[0].aval.shape
    (u, of_u), (v, of_v) = (_unrepeated(w, shape, made_in) for w in eqn.invars)
    both = [i for i in of_u if i in of_v]
    alone = [i for i in of_u if i not in both], [i for i in of_v if i not in both]
    order = [*both, *alone[0], *alone[1]]
    if not all(alone) or len(order) > len(shape) or {*order} != {*range(len(shape))}:
        return None
    stack = tuple(of_u.index(i) for i in both), tuple(of_v.index(i) for i in both)
    return (u, v), (((), ()), stack), order


def _unrepeated(
    v: Any, shape: Sequence[int], made_in: Mapping[Any, Any]
) -> tuple[Any, list[int | None]]:
    """What a variable repeats to have a shape, and along which axes of that its own lie."""
    own = getattr(v.aval, "shape", ())
    axes = [i if n == m else None for i, (n, m) in enumerate(zip(own, shape, strict=False))]
    while not _compat.is_literal(v) and v in made_in:
        eqn = made_in[v]
        if eqn.primitive.name != "broadcast_in_dim" or _compat.is_literal(eqn.invars[0]):
            break
        operand, kept = eqn.invars[0], eqn.params["broadcast_dimensions"]
        same = zip(operand.aval.shape, kept, strict=True)
        axes = [axes[i] if n == eqn.params["shape"][i] else None for n, i in same]
        v = operand
    return v, axes
