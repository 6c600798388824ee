"""Calls of functions with rules of differentiation of their own, with the products in the rules.

They are as the other calls in `_enter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from singd_jax import _compat
from singd_jax._axes import View
from singd_jax._backward import Walk
from singd_jax._joins import Join
from singd_jax._measured import measured
from singd_jax._product import Origin
from singd_jax._reasons import made_by
from singd_jax._spread import GRADIENT, Spread
from singd_jax._tap import Port
from singd_jax._targets import Target, are_outside
from singd_jax._trace import Called, Results, Tracer

SHARED = "its result's gradient, times a number or with others"


def custom_jvp(tracer: Tracer, called: Called) -> Results:
    """`jax.custom_jvp`: the gradient is the transpose of its rule, which is linear in tangents.

    So the products to visit are a parameter's tangent's, inside the rule.
    """
    eqn, values, origins, ports, gives = called
    given, returned = _smooth(eqn.invars), _smooth(eqn.outvars)

    def rule(values: Any, tangents: Any) -> Any:
        function, chosen = _of_smooth(eqn, given, values)
        return jax.jvp(lambda *some: function(*some)[0], chosen, tangents)[1]

    def zeros(values: Any) -> list[Any]:
        chosen = [values[i] for i in given]
        return [_compat.vary(jnp.zeros_like(x), _compat.varying(x)) for x in chosen]

    closed = jax.make_jaxpr(rule)(values, zeros(values))
    closed = tracer.keep(_compat.without_dead_equations(closed))
    if tracer.spread.known:
        spread = tracer.spread.of(eqn.invars)
        tracer.spread.follow(closed.jaxpr, closed.consts, [*spread, *(spread[i] for i in given)])
    inside = [*[None] * len(values), *(tracer.closed(origins[i], "custom_jvp") for i in given)]
    found: list[Origin] = []
    of_returned = [gives[i] for i in returned]
    within, unchecked = tracer.within, tracer.spread.unchecked

    def linear(values: Any, tangents: Any, ports: Any) -> Any:
        args = [*values, *tangents]
        now = tracer.within, tracer.spread.unchecked  # the backward pass enters it once more
        tracer.within, tracer.spread.unchecked = within, unchecked
        try:
            results, found[:] = tracer.run(
                closed.jaxpr, closed.consts, args, inside, ports, of_returned
            )
        finally:
            tracer.within, tracer.spread.unchecked = now
        return results

    @jax.custom_vjp
    def call(values: Any, ports: Any) -> Any:
        return _compat.evaluate(eqn, values)

    def forward(values: Any, ports: Any) -> Any:
        return call(values, ports), (values, ports)

    def backward(residuals: Any, g: Any) -> Any:
        values, ports = residuals
        _, pull = jax.vjp(lambda *args: linear(values, *args), zeros(values), ports)
        pulled, of_ports = pull([g[i] for i in returned])
        return _with([None] * len(values), given, pulled), of_ports

    call.defvjp(forward, backward)
    jax.eval_shape(linear, values, zeros(values), ports)  # finds products and origins
    origin_of = dict(zip(returned, found, strict=True))
    return call(values, ports), [origin_of.get(i) for i in range(len(eqn.outvars))]


def custom_vjp(tracer: Tracer, called: Called) -> Results:
    """`jax.custom_vjp`: its backward pass shows what a weight's gradient is the product of."""
    eqn, values, origins, ports, _ = called  # the rule is one for all results
    given = [i for i in _smooth(eqn.invars) if tracer.perturbed(eqn.invars[i])]
    returned = _smooth(eqn.outvars)
    tree: Any = None

    def forward(values: Any) -> Any:
        nonlocal tree
        function, chosen = _of_smooth(eqn, given, values)
        _, pull, results = jax.vjp(function, *chosen, has_aux=True)
        residuals, tree = jax.tree.flatten(pull)
        return results, residuals

    first = jax.make_jaxpr(forward)(values)
    kept = first.out_avals[len(eqn.outvars) :]
    gradients = [first.out_avals[i] for i in returned]
    second = jax.make_jaxpr(lambda residuals, g: tree.unflatten(residuals)(g))(kept, gradients)
    second = tracer.keep(_compat.without_dead_equations(second))
    walk = Walk(tracer, _followed(tracer, eqn, origins, first, second))
    inside = [tracer.closed(origins[i], "custom_vjp") for i in given]
    wanted = [[Target(o)] if isinstance(o, View) else [] for o in inside]
    plan, left = walk.run(second.jaxpr, wanted, tracer.within)
    for o in inside:
        if isinstance(o, Join):
            tracer.note(o, made_by("one product for several weights"))
    for targets in left[: len(kept)]:
        walk.notes += [(t.view, made_by("its forward pass")) for t in targets]
    found: list[Origin] = [None] * len(eqn.outvars)
    for i, targets in zip(returned, left[len(kept) :], strict=True):
        if len(targets) == 1 and are_outside([targets]):
            found[i] = targets[0].shown
        else:
            walk.notes += [(t.view, made_by(SHARED)) for t in targets]
    for view, why in walk.notes:
        tracer.note(view, why)
    for key, path, bias in walk.biases:
        tracer.noted.biases[key][path] = bias
    if not plan.keys:
        return _compat.evaluate(eqn, values), found

    def back(residuals: Any, g: Any, ports: Any) -> Any:
        return measured(walk, plan, second.jaxpr, second.consts, [*residuals, *g], ports)

    @jax.custom_vjp
    def call(values: Any, ports: Any) -> Any:
        return _compat.evaluate(eqn, values)

    def run(values: Any, ports: Any) -> Any:
        results = _compat.apply(first, values)
        return results[: len(eqn.outvars)], (results[len(eqn.outvars) :], ports)

    def backward(saved: Any, g: Any) -> Any:
        residuals, ports = saved
        pulled, of_ports = back(residuals, [g[i] for i in returned], ports)
        return _with([None] * len(values), given, pulled), {
            k: Port(of_ports.get(k), None) for k in ports
        }

    call.defvjp(run, backward)
    # finds products: now, since equal calls are told what was found in this one
    jax.eval_shape(back, kept, gradients, ports)
    return call(values, ports), found


def _followed(
    tracer: Tracer, eqn: Any, origins: Sequence[Origin], first: Any, second: Any
) -> Spread:
    """What the values of a backward pass `second` depend on, from the forward pass `first`."""
    spread, n = Spread(), len(eqn.outvars)
    spread.unchecked = tracer.spread.unchecked
    given = [
        axes | {o.leaf} if isinstance(o, View) else axes
        for axes, o in zip(tracer.spread.of(eqn.invars), origins, strict=True)
    ]
    spread.follow(first.jaxpr, first.consts, given)
    made = spread.of(first.jaxpr.outvars)
    of_g = [made[i] | {GRADIENT} for i in _smooth(eqn.outvars)]
    spread.follow(second.jaxpr, second.consts, [*made[n:], *of_g])
    return spread


def _smooth(variables: Sequence[Any]) -> list[int]:
    """Which of them have gradients."""
    return [i for i, v in enumerate(variables) if _compat.is_smooth(v)]


def _with(values: Sequence[Any], at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The values, with new ones at some places."""
    found = list(values)
    for i, x in zip(at, new, strict=True):
        found[i] = x
    return found


def _of_smooth(
    eqn: Any, given: Sequence[int], values: Sequence[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """An equation as a function of the given operands, and these.

    It returns those results that have gradients, and all of them.
    """
    returned = _smooth(eqn.outvars)

    def function(*some: Any) -> Any:
        results = _compat.evaluate(eqn, _with(values, given, some))
        return [results[i] for i in returned], results

    return function, [values[i] for i in given]
