"""Equations that call other jaxprs, rebuilt so that the products inside are visited.

Each is rebuilt by the public transformation it came from. All take the tracer and what is called,
and return the results and their origins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from singd_jax import _compat
from singd_jax import _twins as twins
from singd_jax._axes import View
from singd_jax._joins import Join
from singd_jax._product import Origin, Product
from singd_jax._reasons import STACKED
from singd_jax._rules import custom_jvp, custom_vjp
from singd_jax._tap import Slice
from singd_jax._trace import Called, Enter, Results, Tracer


def inline(tracer: Tracer, called: Called) -> Results:
    """`jit`: its compilation is left to the step around it."""
    eqn, values, origins, ports, gives = called
    jaxpr, consts = _compat.inner_jaxpr(eqn)
    return tracer.run(jaxpr, consts, values, origins, ports, gives)


def remat(tracer: Tracer, called: Called) -> Results:
    """`jax.checkpoint`."""
    eqn, values, origins, ports, gives = called
    jaxpr, consts = _compat.inner_jaxpr(eqn)
    p = eqn.params

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.checkpoint(function, policy=p["policy"], prevent_cse=p["prevent_cse"])

    same = None if consts else (id(jaxpr), id(p["policy"]), p["prevent_cse"], *gives)
    body = functools.partial(tracer.run, jaxpr, consts, gives=gives)
    return twins.run(tracer, body, made, same, values, origins, ports)


def cond(tracer: Tracer, called: Called) -> Results:
    """`lax.cond`, `lax.switch` and `lax.platform_dependent`."""
    eqn, values, origins, ports, gives = called
    # what one branch adds to the output of a layer outside is no bias of it
    inside = [None if isinstance(o, Product) else o for o in origins[1:]]

    def branch(closed: Any) -> Callable[..., Any]:
        def body(values: Any, ports: Any) -> Any:
            results, found = tracer.run(closed.jaxpr, closed.consts, values, inside, ports, gives)
            _note_returned(tracer, found, "cond")
            return results

        return body

    branches = [branch(closed) for closed in eqn.params["branches"]]
    results = _compat.switch(eqn, values[0], branches, values[1:], ports)
    return list(results), [None] * len(results)


def scan(tracer: Tracer, called: Called) -> Results:
    """`lax.scan`: a leaf that is scanned over is a stack of weights, with a port for each."""
    eqn, values, origins, ports, gives = called
    p = eqn.params
    body, (n_consts, n_carry) = p["jaxpr"], _compat.scan_counts(p)
    first = n_consts + n_carry
    tracer.scans[id(eqn)] = p["length"]
    for o in origins[n_consts:first]:
        tracer.note(o, "carried through a scan")
    entered: list[Origin] = []
    scanned = [o for o in origins[first:] if isinstance(o, View) and not o.picks]
    for o in origins[first:]:
        entered.append(o.enter_scan(id(eqn)) if isinstance(o, View) and not o.picks else None)
        if isinstance(o, Join):
            tracer.note(o, STACKED)
        elif isinstance(o, View) and o.picks:
            tracer.note(o, "indexed at run time, and then scanned over")
    consts: list[Origin] = []
    for o in origins[:n_consts]:
        twice = isinstance(o, View) and any(o.holds(view.key) for view in scanned)
        if twice:
            tracer.note(o, "scanned over, and read whole in every step of the same scan")
        consts.append(None if twice else o)
    inside = [*consts, *[None] * n_carry, *entered]
    sliced = {k: v for k, v in ports.items() if _stacked(scanned, k, tracer.stacks[k])}
    whole = {k: v for k, v in ports.items() if k not in sliced}
    slots = {k: port.slot for k, port in sliced.items()}
    of_step = _compat.scanned(eqn, gives)

    def step(carry: Any, xs: Any) -> Any:
        xs, slots, i = xs
        mine = {
            k: port._replace(slot=slots[k], factors=Slice(port.factors, i))
            for k, port in sliced.items()
        }
        args = [*values[:n_consts], *carry, *xs]
        results, found = tracer.run(
            body.jaxpr, body.consts, args, inside, {**whole, **mine}, of_step
        )
        _note_returned(tracer, found, "scan")
        return results[:n_carry], results[n_carry:]

    carry, ys = jax.lax.scan(
        step,
        values[n_consts:first],
        (values[first:], slots, jnp.arange(p["length"])),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys], [None] * len(eqn.outvars)


def shard_map(tracer: Tracer, called: Called) -> Results:
    """`jax.shard_map`."""
    eqn, values, origins, ports, gives = called
    specs = eqn.params["in_specs"]
    tracer.spread.enter(eqn)
    jaxpr, consts = _compat.inner_jaxpr(eqn)
    inside = []
    for o, spec in zip(origins, specs, strict=True):
        replicated = all(axis is None for axis in spec)
        if not replicated:
            tracer.note(o, "sharded by shard_map")
        inside.append(tracer.closed(o, "shard_map") if replicated else None)

    def body(values: Any, ports: Any) -> Any:
        return tracer.run(jaxpr, consts, values, inside, ports, gives)[0]

    unchecked = tracer.spread.unchecked
    if not eqn.params["check_vma"]:
        tracer.spread.unchecked = unchecked | frozenset(_compat.manual_axes(eqn))
    results = _compat.shard_map(eqn, body)(values, dict(ports))
    tracer.spread.unchecked = unchecked
    return results, [None] * len(results)


def _note_returned(tracer: Tracer, origins: Sequence[Origin], name: str) -> None:
    for origin in origins:
        tracer.note(origin, f"returned by a `{name}`")


def _stacked(views: Sequence[View], key: Any, stack: Sequence[Any]) -> bool:
    """Whether a scan over the first axes of the views takes one layer of a stack after the other.

    The weight may be scanned along another axis besides, by something that is no layer.
    """
    return any(
        view.holds(key) and list(stack[len(view.stack) :])[:1] == [view.dims[0]] for view in views
    )


CALLS: Mapping[str, Enter] = {
    **dict.fromkeys(_compat.INLINE, inline),
    "remat2": remat,
    "scan": scan,
    "cond": cond,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "shard_map": shard_map,
}
