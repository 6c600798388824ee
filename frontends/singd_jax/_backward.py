"""Rows from the backward pass that a function with a rule of its own (`jax.custom_vjp`) brings.

Such a rule may compute anything. Where it makes a weight's gradient as a product xᵀg, maybe summed
over the steps of a loop, x and g are the rows, whatever the function is. `Walk` goes from the
weight's gradient back to these products, and `measured` evaluates the pass and measures them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from singd_jax import _calls, _compat
from singd_jax._axes import Group, Key, View, axes_of, restored
from singd_jax._product import Bias, Path, bias_of
from singd_jax._reasons import made_by
from singd_jax._spread import GRADIENT, Spread
from singd_jax._targets import (
    Hit,
    Level,
    Numbers,
    Plan,
    Target,
    Targets,
    are_outside,
    entered,
    is_sum,
    is_zero,
    left_of,
    needs,
    number_of,
    outer_product,
)
from singd_jax._trace import Tracer


class Walk:
    """The way back from gradients of weights to the products that make them."""

    def __init__(self, tracer: Tracer, spread: Spread) -> None:
        self.tracer, self.spread = tracer, spread
        self.notes: list[tuple[View, str]] = []
        # gradients of outputs, with their axes as the product has them
        self.outputs: dict[tuple[Path, Any], tuple[Hit, tuple[Group, ...]]] = {}
        self.biases: list[tuple[Key, Path, Bias]] = []

    def run(self, jaxpr: _compat.Jaxpr, wanted: Targets, within: Path) -> tuple[Plan, Targets]:
        """The products that make the results of a jaxpr, and what remains at its operands."""
        self.plan(jaxpr, wanted, within)  # finds the gradients of outputs, which biases are sums of
        self.notes, self.biases = [], []
        return self.plan(jaxpr, wanted, within)

    def plan(self, jaxpr: _compat.Jaxpr, wanted: Targets, within: Path) -> tuple[Plan, Targets]:
        plan = Plan()
        at: dict[Any, list[Target]] = collections.defaultdict(list)
        made_in = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        level = Level(plan, within, made_in)

        def give(v: Any, targets: Sequence[Target]) -> None:
            for t in targets:
                if is_zero(v, made_in) or self._is_bias(v, t, within):
                    continue
                if _compat.is_literal(v):
                    self.note(t, made_by("a constant"))
                else:
                    at[v].append(t)

        for v, some in zip(jaxpr.outvars, wanted, strict=True):
            give(v, some)
        for eqn in reversed(jaxpr.eqns):
            targets = [at.pop(v, []) for v in eqn.outvars]
            if not any(targets):
                continue
            if eqn.primitive.name in ENTER:
                found = self._enter(eqn, targets, level)
            else:
                found = [[] for _ in eqn.invars]
                for t in targets[0]:
                    self._back(eqn, t, found, level)
                for t in (t for more in targets[1:] for t in more):
                    self.note(t, made_by(f"`{eqn.primitive.name}`"))
            for v, more in zip(eqn.invars, found, strict=True):
                give(v, more)
        for v in jaxpr.constvars:
            for t in at.get(v, []):
                self.note(t, made_by("a constant"))
        return plan, [at.get(v, []) for v in jaxpr.invars]

    def note(self, target: Target, reason: str) -> None:
        self.notes.append((target.view, reason))

    def _is_bias(self, v: Any, target: Target, within: Path) -> bool:
        """Whether a weight's gradient is the sum of the gradients of a product's outputs."""
        if (within, v) not in self.outputs:
            return False
        hit, dims = self.outputs[within, v]
        call, path = hit.call, hit.path
        same = hit.target.numbers == target.numbers and hit.target.outer == target.outer
        shown = dataclasses.replace(target, numbers=()).shown
        bias = bias_of(call, dims, shown) if same else None
        if bias is not None:
            self.biases.append((call.view.key, path, bias))
        return bias is not None

    def _back(self, eqn: Any, t: Target, found: Targets, level: Level) -> None:
        """One step back: what an equation's result is the gradient of, its operands are."""
        name, p, view = eqn.primitive.name, eqn.params, t.view
        shapes = [v.aval.shape for v in eqn.invars]
        if name in ("add", "add_any", "sub"):
            for i, v in enumerate(eqn.invars):
                if v.aval.shape == eqn.outvars[0].aval.shape:
                    found[i].append(t.times(-1.0) if name == "sub" and i else t)
                elif not is_zero(v, level.made_in):
                    self.note(t, made_by("a sum with what is repeated"))
        elif name == "neg":
            found[0].append(t.times(-1.0))
        elif name in ("mul", "div") and (side := self._multiplied(eqn, level.made_in)) is not None:
            number = number_of(eqn.invars[1 - side], level.made_in)
            found[side].append(t.times(number, name == "div"))
        elif name in ("reduce_sum", "psum", "psum_invariant"):
            at, dims = p["axes"], list(view.dims)
            for axis in sorted(at) if name == "reduce_sum" else ():
                dims.insert(axis, ((-1 - len(dims), 1, shapes[0][axis]),))
            found[0].append(t.of(dims))
        elif name == "concatenate":
            start = 0
            for i, shape in enumerate(shapes):
                n = shape[p["dimension"]]
                part = view.narrow(p["dimension"], start, n)
                start += n
                if part is None:
                    self.note(t, made_by(f"`{name}`"))
                else:
                    found[i].append(t.seen_as(part))
        elif name == "dot_general":
            self._hit(eqn, eqn.invars, p["dimension_numbers"], t, level)
        elif name == "mul" and (outer := outer_product(eqn, level.made_in)) is not None:
            operands, numbers, order = outer
            t = t.of([view.dims[i] for i in order])
            self._hit(eqn, operands, numbers, t, level)
        elif (dims_ := restored(name, p, view.dims, shapes[0] if shapes else ())) is not None:
            found[0].append(t.of(dims_))
        else:
            self.note(t, made_by(f"`{name}`"))

    def _multiplied(self, eqn: Any, made_in: Mapping[Any, Any]) -> int | None:
        """Which operand of a product is multiplied by a number, the other."""
        if number_of(eqn.invars[1], made_in) is not None:
            return 0
        first = eqn.primitive.name == "mul" and number_of(eqn.invars[0], made_in) is not None
        return 1 if first else None

    def _hit(
        self, eqn: Any, operands: Sequence[Any], numbers: Any, t: Target, level: Level
    ) -> None:
        """A product, as `dot_general` has it, whose operands are the rows."""
        side = self._inputs(operands, t.view.leaf)
        if side is None:
            self.note(t, made_by("a product of two gradients"))
            return
        (xc, gc), (xb, gb) = [pair if side == 0 else pair[::-1] for pair in numbers]
        x, g = operands[side], operands[1 - side]
        xf = [i for i in range(x.aval.ndim) if i not in (*xc, *xb)]
        gf = [i for i in range(g.aval.ndim) if i not in (*gc, *gb)]
        nb, nx, ng = len(xb), len(xf), len(gf)
        of_x, of_g = (nb, nb + nx) if side == 0 else (nb + ng, nb)
        kept = [k for k in range(nb) if not is_sum(t.view.dims[k])]
        # the weight's axes as the product has them: of the stack, of inputs, of outputs
        where = [*kept, *range(of_x, of_x + nx), *range(of_g, of_g + ng)]
        lengths = [x.aval.shape[i] for i in (*(xb[k] for k in kept), *xf)]
        lengths += [g.aval.shape[i] for i in gf]
        dims = [t.view.dims[i] for i in where]
        if any(n != 1 and (not d or d[0][0] < 0) for n, d in zip(lengths, dims, strict=True)):
            self.note(t, made_by("a sum of a product's entries"))
            return
        t = t.of(dims)
        stack, ins = tuple(range(len(kept))), tuple(range(len(kept), len(kept) + nx))
        pairs = (tuple(xf), ins), (tuple(xb[k] for k in kept), stack)
        params = {"dimension_numbers": pairs}
        call = _calls.dot_general(params, 1, t.view, x.aval.shape, self.tracer.batch_size)
        if isinstance(call, str):
            self.note(t, call)
            return
        # rows are what is summed, in the order of the axes of x
        rows = [*zip(xc, gc, strict=True), *((xb[k], gb[k]) for k in range(nb) if k not in kept)]
        order = (*(gb[k] for k in kept), *(j for _, j in sorted(rows)), *gf)
        path = (*level.within, id(eqn), sum(hit.eqn is eqn for hit in level.plan.hits))
        hit = Hit(eqn, t, call, x, g, order, path)
        level.plan.hits.append(hit)
        own = axes_of([g.aval.shape[i] for i in order])
        self._remember(hit, [own[order.index(i)] for i in range(len(order))], level.made_in)

    def _inputs(self, operands: Sequence[Any], leaf: int) -> int | None:
        """Which operand of a product are the inputs: the one that depends on no gradient.

        If none does, the gradient of the outputs was made before: by the weight itself.
        """
        for mark in (GRADIENT, leaf):
            on = [mark in axes for axes in self.spread.of(operands)]
            if any(on):
                return None if all(on) else on.index(False)
        return None

    def _remember(self, hit: Hit, dims: Any, made_in: Mapping[Any, Any]) -> None:
        """That g, of such axes, and what it is a rearrangement of, are gradients of outputs."""
        v = hit.g
        while dims is not None:
            self.outputs.setdefault((hit.path[:-2], v), (hit, dims))
            eqn = made_in.get(v)
            if eqn is None or not eqn.invars:
                return
            v = eqn.invars[0]
            dims = restored(eqn.primitive.name, eqn.params, dims, v.aval.shape)

    # ---- equations that run other jaxprs --------------------------------------------------------

    def _enter(self, eqn: Any, targets: Targets, level: Level) -> Targets:
        plan = level.plan
        numbers: dict[int, Numbers] = {}
        wanted: Targets = [[] for _ in targets]
        for mine, given in zip(wanted, targets, strict=True):
            for t in given:
                known = numbers.setdefault(t.view.leaf, t.numbers)
                if known != t.numbers or any(needs(v, eqn, level.made_in) for v, _ in known):
                    self.note(t, made_by("numbers that differ or are computed after a loop"))
                else:
                    mine.append(t.inside)
        name, path = eqn.primitive.name, (*level.within, id(eqn))
        found = ENTER[name](self, eqn, wanted, path)
        if found is None:
            for t in (t for some in wanted for t in some):
                self.note(t, made_by(f"a `{name}` that is no sum"))
            return [[] for _ in eqn.invars]
        plans, left = found
        if any(sub.keys for sub in plans):
            plan.inner[id(eqn)], plan.numbers[id(eqn)] = plans, numbers

        def outside(t: Target) -> Target:
            own = numbers[t.view.leaf]
            return Target(t.view, (*own, *t.numbers), t.outer[: len(t.outer) - len(own)])

        return [[outside(t) for t in some] for some in left]

    def _call(self, eqn: Any, wanted: Targets, path: Path) -> tuple[list[Plan], Targets] | None:
        jaxpr, _ = _compat.inner_jaxpr(eqn)
        plan, left = self.plan(jaxpr, wanted, path)
        given = {v: number_of(u, {}) for v, u in zip(jaxpr.invars, eqn.invars, strict=True)}
        if not are_outside(left, given):
            return None
        return [plan], [[t.renamed(given) for t in some] for some in left]

    def _cond(self, eqn: Any, wanted: Targets, path: Path) -> tuple[list[Plan], Targets] | None:
        both = [
            self.plan(closed.jaxpr, wanted, (*path, i))
            for i, closed in enumerate(eqn.params["branches"])
        ]
        (_, left), *others = both
        if any(left != other for _, other in others) or not are_outside(left):
            return None
        return [plan for plan, _ in both], [[], *left]

    def _loop(self, eqn: Any, wanted: Targets, path: Path) -> tuple[list[Plan], Targets] | None:
        """A loop that adds to what it carries, or puts together what its steps make."""
        body, before, consts, carry = parts(eqn)
        self.tracer.scans[id(eqn)] = length = eqn.params.get("length", 1)
        inside = [
            *wanted[:carry],
            *([entered(t, id(eqn)) for t in some] for some in wanted[carry:]),
        ]
        plan, left = self.plan(body.jaxpr, inside, path)
        first = consts + carry
        if any(left[:consts]) or left[consts:first] != wanted[:carry] or not are_outside(left):
            return None
        xs = [[left_of(t, id(eqn), length) for t in some] for some in left[first:]]
        return [plan], [*([] for _ in range(before + consts)), *wanted[:carry], *xs]


ENTER: Mapping[str, Callable[..., tuple[list[Plan], Targets] | None]] = {
    **dict.fromkeys(_compat.RUNS, Walk._call),
    "cond": Walk._cond,
    "scan": Walk._loop,
    "while": Walk._loop,
}


def parts(eqn: Any) -> tuple[Any, int, int, int]:
    """The body of a loop; the numbers of operands before its own, of constants and carried ones."""
    p = eqn.params
    if eqn.primitive.name == "scan":
        return p["jaxpr"], 0, *_compat.scan_counts(p)
    before, consts = p["cond_nconsts"], p["body_nconsts"]
    return p["body_jaxpr"], before, consts, len(eqn.invars) - before - consts
