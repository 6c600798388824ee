"""Evaluating a backward pass, with the products that `_backward` has found in it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_jax import _calls, _compat
from singd_jax._axes import Key
from singd_jax._backward import Walk, parts
from singd_jax._tap import Port, Ports, Slice
from singd_jax._targets import Hit, Numbers, Plan

Got: TypeAlias = dict[Key, Any]  # what the taps of each weight return


def measured(
    walk: Walk,
    plan: Plan,
    jaxpr: _compat.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    ports: Ports,
) -> tuple[list[Any], Got]:
    """The results of a jaxpr, and what the taps of a plan's products return, by weight."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, args, strict=True)
    made_in = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    got: Got = {}

    def read(v: Any) -> Any:
        if _compat.is_literal(v):
            return v.val
        if v not in env:  # a number that is wanted before its turn
            evaluate(made_in[v])
        return env[v]

    @_compat.promoting
    def scaled(port: Port | None, numbers: Numbers) -> Port | None:
        """The port with what multiplies the gradient of its outputs as its factor."""
        if port is None or not numbers:
            return port
        factor: Any = 1.0 if port.factor is None else port.factor
        for v, divides in numbers:
            number = v if isinstance(v, float) else jnp.reshape(read(v), ())
            factor = factor / number if divides else factor * number
        return port._replace(factor=factor)

    def evaluate(eqn: Any) -> None:
        if all(v in env for v in eqn.outvars):
            return
        values, plans = [read(v) for v in eqn.invars], plan.inner.get(id(eqn))
        if plans is None:
            results = _compat.evaluate(eqn, values)
        else:
            numbers = plan.numbers[id(eqn)]
            inside = {k: scaled(port, numbers.get(k[0], ())) for k, port in ports.items()}
            results, more = _RUN[eqn.primitive.name](walk, eqn, plans, values, inside)
            _add(got, more)
        env.update(zip(eqn.outvars, results, strict=True))

    for eqn in jaxpr.eqns:
        evaluate(eqn)
    for hit in plan.hits:
        x, g = read(hit.x), jnp.transpose(read(hit.g), hit.order)
        port = scaled(ports.get(hit.target.view.key), hit.target.numbers)
        _add(got, _visit(walk, hit, x, g, port))
    return [read(v) for v in jaxpr.outvars], got


@_compat.promoting
def _visit(walk: Walk, hit: Hit, x: Any, g: Any, port: Port | None) -> Got:
    """What the tap of a product with such rows returns: the gradient of its slot."""
    view, ports, g = hit.target.view, {}, _calls.wide(g)
    if port is not None and port.factor is not None:
        g = (g * port.factor).astype(g.dtype)
    walk.spread.refuse_shared(hit.x, x, g)
    call = walk.tracer.record(hit.call, hit.path, x, g, walk.spread)

    def product(slot: Any) -> Array:
        if port is not None:
            ports[view.key] = port._replace(slot=slot).of(view)
        return walk.tracer.visit(view.key, call, x, jnp.zeros_like(g), ports)

    if port is None:
        product(None)
        return {}
    return {view.key: jax.vjp(product, port.slot)[1](g)[0]}


def _add(got: Got, more: Got) -> None:
    for key, sums in more.items():
        got[key] = jax.tree.map(jnp.add, got[key], sums) if key in got else sums


def _run_call(walk: Walk, eqn: Any, plans: Any, values: Any, ports: Ports) -> Any:
    jaxpr, consts = _compat.inner_jaxpr(eqn)
    return measured(walk, plans[0], jaxpr, consts, values, ports)


def _run_cond(walk: Walk, eqn: Any, plans: Any, values: Any, ports: Ports) -> Any:
    keys = set[Key]().union(*(plan.keys for plan in plans)) & ports.keys()

    def branch(closed: Any, plan: Plan) -> Callable[..., Any]:
        def run(values: Any, ports: Any) -> Any:
            results, got = measured(walk, plan, closed.jaxpr, closed.consts, values, ports)
            return results, {k: got.get(k, ports[k].slot) for k in keys}

        return run

    pairs = zip(eqn.params["branches"], plans, strict=True)
    branches = [branch(closed, plan) for closed, plan in pairs]
    return _compat.switch(eqn, values[0], branches, values[1:], ports)


def _run_while(walk: Walk, eqn: Any, plans: Any, values: Any, ports: Ports) -> Any:
    p, (body, before, consts, _) = eqn.params, parts(eqn)
    first = before + consts

    def more(carried: Any) -> Any:
        args = [*values[:before], *carried[0]]
        stop = p["cond_jaxpr"]
        return measured(walk, Plan(), stop.jaxpr, stop.consts, args, {})[0][0]

    def step(carried: Any) -> Any:
        args = [*values[before:first], *carried[0]]
        results, found = measured(walk, plans[0], body.jaxpr, body.consts, args, ports)
        _add(found, carried[1])
        return results, found

    return jax.lax.while_loop(more, step, (values[first:], _slots(plans[0], ports)))


def _run_scan(walk: Walk, eqn: Any, plans: Any, values: Any, ports: Ports) -> Any:
    p, (body, _, consts, carry) = eqn.params, parts(eqn)
    (plan,), first = plans, consts + carry
    slots = _slots(plan, ports)
    sliced = {k: slots.pop(k) for k in plan.stacked(id(eqn)) if k in slots}

    def step(carried: Any, xs: Any) -> Any:
        (carried, sums), (xs, own, i) = carried, xs
        mine = dict(ports)
        for k in sliced:
            mine[k] = ports[k]._replace(slot=own[k], factors=Slice(ports[k].factors, i))
        args = [*values[:consts], *carried, *xs]
        results, found = measured(walk, plan, body.jaxpr, body.consts, args, mine)
        ours = {k: found.pop(k) for k in sliced}
        _add(found, sums)
        return (results[:carry], found), (results[carry:], ours)

    (carried, sums), (ys, ours) = jax.lax.scan(
        step,
        (values[consts:first], slots),
        (values[first:], sliced, jnp.arange(p["length"])),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carried, *ys], {**sums, **ours}


def _slots(plan: Plan, ports: Ports) -> Got:
    """Zeros for what the taps of a plan add up."""
    return {k: ports[k].slot for k in plan.keys if k in ports}


_RUN: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(_compat.RUNS, _run_call),
    "cond": _run_cond,
    "scan": _run_scan,
    "while": _run_while,
}
