"""Along which axes of a mesh the values inside shard_map differ between devices.

Types do not tell: without check_vma they say nothing, and with it what `all_gather` returns counts
as different. The gradient at shared data is a sum of what each device finds: right for gradients,
and wrong for sums of squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from singd_jax import _compat

Axes: TypeAlias = frozenset[Any]
NONE: Axes = frozenset()
# marks of what depends on gradients, and on parameters, beside the axes of a mesh
GRADIENT, PARAMETERS = "gradient", "parameters"

_SHARES = {"all_gather", "all_gather_invariant", "pmax", "pmin", "psum", "psum_invariant"}
_PARTS = {"all_to_all", "axis_index", "reduce_scatter"}


class Spread:
    """The axes along which each value of the jaxprs that were followed differs.

    Attributes:
        known: Those axes; of an equation that is called twice, what both calls have in common.
        unchecked: The axes of each shard_map without types that is being entered.
    """

    def __init__(self) -> None:
        self.known: dict[_compat.Variable, Axes] = {}
        self.unchecked: Axes = NONE

    def of(self, variables: Sequence[_compat.Variable]) -> list[Axes]:
        """The axes along which operands differ."""
        return [NONE if _compat.is_literal(v) else self.known.get(v, NONE) for v in variables]

    def refuse_shared(self, v: _compat.Variable, x: Any, y: Any) -> None:
        """Raise if the operand `v`, of value `x`, of a product `y` is shared where it must not be.

        Raises:
            ValueError: Naming the axis of the mesh.
        """
        if _compat.is_literal(v) or v not in self.known:
            return
        for axis in self._summed(x, y):
            if axis not in self.known[v] and _length(axis) > 1:
                raise ValueError(
                    f"inside shard_map a parameter multiplies {v.aval.str_short()}, which is the "
                    f"same on all devices along the axis {axis!r} of the mesh and whose type does "
                    "not say so: what devices share is counted wrongly in the curvature. Let jax "
                    "check, shard_map(check_vma=True), the default, and gather nothing that a "
                    "parameter multiplies; or divide the data over all axes"
                )

    def devices(self, x: Any, y: Any) -> int:
        """How many devices have a part of the sum over a product `y` of an operand `x`."""
        return math.prod(map(_length, self._summed(x, y)))

    def _summed(self, x: Any, y: Any) -> list[Any]:
        return sorted(self.unchecked | _compat.varying(x) | _compat.varying(y), key=str)

    def enter(self, eqn: _compat.Equation) -> None:
        """Follow the body of a shard_map."""
        jaxpr, consts = _compat.inner_jaxpr(eqn)
        self.follow(jaxpr, consts, _divided(eqn, self.of(eqn.invars)))

    def follow(self, jaxpr: _compat.Jaxpr, consts: Sequence[Any], given: Sequence[Axes]) -> None:
        """Remember along which axes the values of a jaxpr differ, from its operands' axes."""
        for v, axes in self._values(jaxpr, consts, given).items():
            self.known[v] = self._both(axes, self.known.get(v, axes))

    def _both(self, a: Axes, b: Axes) -> Axes:
        """What holds for a value of a jaxpr that is called twice."""
        return a & b

    def _values(
        self, jaxpr: _compat.Jaxpr, consts: Sequence[Any], given: Sequence[Axes]
    ) -> dict[_compat.Variable, Axes]:
        """All values of a jaxpr and of the jaxprs it calls."""
        found = dict(zip(jaxpr.constvars, map(_compat.varying, consts), strict=True))
        found |= zip(jaxpr.invars, given, strict=True)
        inner: dict[_compat.Variable, Axes] = {}
        for eqn in jaxpr.eqns:
            values = [NONE if _compat.is_literal(v) else found[v] for v in eqn.invars]
            results, of_calls = self._equation(eqn, values)
            for v, axes in of_calls.items():
                inner[v] = self._both(axes, inner.get(v, axes))
            found |= zip(eqn.outvars, results, strict=True)
        return inner | found

    def _equation(
        self, eqn: _compat.Equation, values: list[Axes]
    ) -> tuple[list[Axes], dict[_compat.Variable, Axes]]:
        name, p, n = eqn.primitive.name, eqn.params, len(eqn.outvars)
        every = NONE.union(*values)
        if name in _SHARES and p.get("axis_index_groups") is None:
            return [axes - _named(p) for axes in values], {}
        if name in _PARTS:
            return [every | _named(p)] * n, {}
        if name in _compat.RUNS:
            return self._call(*_compat.inner_jaxpr(eqn), values)
        if name == "shard_map":
            results, inner = self._call(*_compat.inner_jaxpr(eqn), _divided(eqn, values))
            return [axes - frozenset(_compat.manual_axes(eqn)) for axes in results], inner
        if name == "cond":
            parts = [self._call(b.jaxpr, b.consts, values[1:]) for b in p["branches"]]
            results = [values[0].union(*axes) for axes in zip(*(r for r, _ in parts), strict=True)]
            return results, {v: axes for _, inner in parts for v, axes in inner.items()}
        if name == "scan":
            consts, carry = _compat.scan_counts(p)
            return self._loop(p["jaxpr"], values, consts, carry, NONE)
        if name == "while":
            first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
            stops = NONE.union(*values[:first])
            carry = len(values) - second
            return self._loop(p["body_jaxpr"], values[first:], second - first, carry, stops)
        return [every] * n, {}

    def _call(
        self, jaxpr: _compat.Jaxpr, consts: Sequence[Any], given: Sequence[Axes]
    ) -> tuple[list[Axes], dict[_compat.Variable, Axes]]:
        inner = self._values(jaxpr, consts, given)
        return [NONE if _compat.is_literal(v) else inner[v] for v in jaxpr.outvars], inner

    def _loop(
        self, body: Any, values: list[Axes], consts: int, carry: int, stops: Axes
    ) -> tuple[list[Axes], dict[_compat.Variable, Axes]]:
        """A loop, run until what it carries differs along no further axis."""
        while True:
            results, inner = self._call(body.jaxpr, body.consts, values)
            old = values[consts : consts + carry]
            new = [a | b | stops for a, b in zip(old, results, strict=False)]
            if new == old:
                return [axes | stops for axes in results], inner
            values = [*values[:consts], *new, *values[consts + carry :]]


class Perturbed(Spread):
    """Which values change with the parameters, for all that autodiff sees of it.

    It follows a loss only if it is asked: most have no rules of their own, which ask.
    """

    def __init__(self, *loss: Any) -> None:
        super().__init__()
        self._loss = loss

    def __call__(self, v: _compat.Variable) -> bool:
        """Whether a value may change; one that is not known may."""
        if self._loss and not self.known:
            self.follow(*self._loss)
        return not _compat.is_literal(v) and PARAMETERS in self.known.get(v, {PARAMETERS})

    def _both(self, a: Axes, b: Axes) -> Axes:
        return a | b

    def _equation(
        self, eqn: _compat.Equation, values: list[Axes]
    ) -> tuple[list[Axes], dict[_compat.Variable, Axes]]:
        results, inner = super()._equation(eqn, values)
        if eqn.primitive.name in _compat.OWN_RULES:
            results = [NONE.union(*values)] * len(results)
        elif eqn.primitive.name in _compat.REFS:  # what was written there is not followed
            results = [frozenset([PARAMETERS])] * len(results)
        flat = eqn.primitive.name in _compat.FLAT
        return [
            NONE if flat or not _compat.is_smooth(v) else axes
            for v, axes in zip(eqn.outvars, results, strict=True)
        ], inner


def _length(axis: Any) -> int:
    lax: Any = jax.lax  # its psum has no types
    return int(lax.psum(1, axis))


def _named(params: Any) -> Axes:
    """The axes of the mesh that a collective names."""
    named = params["axes"] if "axes" in params else params["axis_name"]
    return frozenset(named if isinstance(named, (tuple, list)) else (named,))


def _divided(eqn: _compat.Equation, values: Sequence[Axes]) -> list[Axes]:
    """What enters a shard_map, which differs along the axes that divide it."""
    found = []
    for axes, spec in zip(values, eqn.params["in_specs"], strict=True):
        parts = [part if isinstance(part, tuple) else (part,) for part in spec]
        found.append(axes.union(*parts) - {None})
    return found
