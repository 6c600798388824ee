"""The gradient of a loss and the curvature of its layers in one backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_core.curvature import Curvature, Measured
from singd_core.layers import Sample
from singd_core.rules import Factors
from singd_jax import _compat, _nnx
from singd_jax._calls import Call
from singd_jax._find import leading
from singd_jax._layers import TRANSPOSED, UPRIGHT, Layer, Layers, Role, checked
from singd_jax._loss import Leaves, size_of_batch
from singd_jax._state import SingdState, find_states, refuse_lost_curvature
from singd_jax._tapped import Tapped, value_and_grad


class Sums(NamedTuple):
    """What the taps of a layer add up, the stack's axes first.

    Attributes:
        K: Of the rows of K, which are inputs unless the matrix is used transposed.
        C: Of those of C.
        N: The number of rows.
        terms: Their number if every position is one.
        uses: The number of products, each counted once however often it runs.
    """

    K: Measured
    C: Measured
    N: Array
    terms: Array
    uses: Array


def value_and_curvature(
    loss: Callable[..., Any], layers: Layers, *, has_aux: bool = False, branch: str = "step"
) -> Callable[..., tuple[Any, Any, dict[str, Curvature]]]:
    """A function of `params, state, *batch` returning the loss, its gradient and the curvature.

    It is `jax.value_and_grad` with one more result, for `tx.update(..., curvature=curvature)`. In
    steps that do not refresh the factors (see `T`) the curvature is zeros, and is not computed.

    Args:
        loss: The loss that the layers were found in.
        layers: What `find_layers` returned.
        has_aux: Whether the loss returns a pair of which the second is auxiliary.
        branch: What decides, where T > 1, whether the curvature is computed: "step", one
            `lax.cond` between two backward passes, or "layer", one in every layer. The latter
            compiles one backward pass instead of two; but each branch is a wait for an accelerator,
            and devices add up the curvature of each layer by itself.

    Returns:
        A function of the parameters, the optimizer's state and the batch. The value is that of
        `jax.value_and_grad`; gradients of what is not trained are None.

    Raises:
        ValueError: If `branch` is unknown, or the state has no state of singd in it, or one that
            optax would not pass the curvature on to; or if the parameters do not fit the layers.
    """
    if branch not in ("step", "layer"):
        raise ValueError(f'branch = {branch!r}: choose "step" or "layer"')
    layers = checked(layers)

    def function(
        params: Any, state: Any, *batch: Any, **keywords: Any
    ) -> tuple[Any, Any, dict[str, Curvature]]:
        state = _nnx.pure(state)
        states = find_states(state)
        refuse_lost_curvature(state)
        trained = layers.of(states)
        factors, slots = _ports(trained, states)
        known = [k for own in states for k, layer in own.layers.items() if layer.has_rows]
        if known and len(layers) and not factors:
            raise ValueError(
                f"the state is that of {', '.join(known)}, and the layers are "
                f"{', '.join(layers)}: give both the same layers"
            )
        leaves = Leaves.of(params)
        trained.refuse_others(
            leaves.named, [leaf for layer in trained.values() for leaf in layer.leaves]
        )
        needed = layers.loss_average == "batch" or layers.kfac_approx == "reduce"
        first = functools.partial(leading, loss, leaves, batch, keywords)
        n = size_of_batch(layers.batch_size, batch, keywords, first) if needed else None
        dues: list[Any] = [own.due for own in states]
        whole = branch == "layer" or any(due is None for due in dues)
        due = {name: own.due for own in states for name in own.rest.layers} if whole else {}
        rows = {name: own.fixed.rows for own in states for name in own.rest.layers}
        sampled = [own for own in states if own.fixed.rows != math.inf]
        steps = {name: own.rest.step for own in sampled for name in own.rest.layers}
        rule = functools.partial(_measure, rows)
        tapped, seen = Tapped(loss, trained, n, rule, due, steps), set[str]()

        def measured() -> tuple[Any, Any, Any, dict[str, Any]]:
            *found, sums, names = tapped.value_and_grad(
                leaves, slots, factors, batch, keywords, has_aux
            )
            seen.update(names)
            return *found, sums

        def plain() -> tuple[Any, Any, Any, dict[str, Any]]:
            return *value_and_grad(loss, leaves, batch, keywords, has_aux), slots

        if whole:
            value, grads, changed, sums = measured()
        else:
            value, grads, changed, sums = jax.lax.cond(jnp.any(jnp.stack(dues)), measured, plain)
        if factors and not seen:
            raise ValueError(
                f"the loss uses none of {', '.join(factors)} as in the loss that the layers were "
                "found in: find the layers of this loss, or give that one"
            )
        leaves.keep(changed)
        curvature = {
            name + role: _curvature(sums[name][role], layers, n, role)
            for name, layer in trained.items()
            for role in layer.roles
            if name + role in seen
        }
        return value, grads, curvature

    return function


def _measure(
    rows: Mapping[str, float], call: Call, layer: Layer, kfac_approx: str
) -> Callable[..., Sums]:
    """The rule that measures so many of the rows, or all, with the layer's factors."""
    transposed, bias = layer.role(call) == TRANSPOSED, layer.bias is not None
    _, d_out, d_in = layer.shape
    most = rows[layer.name] if _compat.is_local() else math.inf
    N = call.examples if kfac_approx == "reduce" else call.rows

    def rule(x: Any, g: Any, factors: Factors, step: Array | None, factor: Any) -> Sums:
        x, g = call.operands(x, g, factor)
        of_K, of_C = (
            Sample.of(most, structure, d, step)
            for structure, d in zip(factors.structures, (d_in, d_out), strict=True)
        )
        of_x, of_g = (of_C, of_K) if transposed else (of_K, of_C)
        A = call.inputs(x, bias and not transposed, kfac_approx, of_x)
        B = call.outputs(g, kfac_approx, of_g)
        stack = B.shape[:-2]
        counted = N if call.sizes is None else call.sizes(x)
        numbers = counted, call.rows, 1.0 / call.times
        if transposed:
            A, B = padded(B) if bias else B, A
        return Sums(
            *factors.measure(A, B),
            *(jnp.broadcast_to(jnp.asarray(n, jnp.float32), stack) for n in numbers),
        )

    return rule


@_compat.any_ranks
def _ports(
    layers: Layers, states: Sequence[SingdState]
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """What each layer is measured with, and zeros for what its roles add up."""
    known = {name: layer.factors for own in states for name, layer in own.rest.layers.items()}
    factors = {name: known[name].measuring() for name in layers}
    slots = {
        name: dict.fromkeys(layer.roles, _slot(layer, factors[name]))
        for name, layer in layers.items()
    }
    return factors, slots


def blank(layers: Layers, states: Sequence[SingdState]) -> dict[str, Curvature]:
    """Zeros like the curvature of all layers."""
    trained = layers.of(states)
    _, slots = _ports(trained, states)
    return {
        name + role: _curvature(slots[name][role], layers, 1, role)
        for name, layer in trained.items()
        for role in layer.roles
    }


def _slot(layer: Layer, factors: Factors) -> Sums:
    """Zeros of the shapes that `measure` returns, to add many up in: in at least float32."""
    stack, d_out, d_in = layer.shape

    def shaped(factors: Factors) -> Sums:
        A, B = (jnp.zeros((*stack, 1, d), jnp.float32) for d in (d_in, d_out))
        number = jnp.zeros(stack, jnp.float32)
        return Sums(*factors.measure(A, B), number, number, number)

    # as on one device: their products need no type that says how they are sharded
    make: Any = jax.ShapeDtypeStruct
    plain = jax.tree.map(lambda a: make(a.shape, a.dtype), factors)
    shapes = jax.eval_shape(shaped, plain)
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )


@_compat.any_ranks
def _curvature(sums: Sums, layers: Layers, batch_size: int | None, role: Role) -> Curvature:
    M: Any = 1
    if layers.loss_average == "batch":
        M = batch_size
    elif layers.loss_average == "batch+sequence":
        M = sums.terms / jnp.where(sums.uses > 0, sums.uses, 1)
    elif layers.loss_average is not None:
        M = layers.loss_average
    if role == UPRIGHT:
        return Curvature.of(sums.K, sums.N, sums.C, M)
    turned = Curvature.of(sums.C, sums.N, sums.K, M)
    return Curvature(turned.H_C, turned.H_K, turned.t_G, turned.t_U)


def joined(curvature: Mapping[str, Curvature], layers: Layers) -> dict[str, Curvature]:
    """The curvature of each layer, from those of its roles."""
    found: dict[str, Curvature] = {}
    for key, (name, _) in layers.curvatures.items():
        if key in curvature:
            c = curvature[key]
            found[name] = found[name].joined(c) if name in found else c
    return found


def padded(rows: Array) -> Array:
    """Rows of K with a zero for the bias, which a transposed use does not see."""
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, 1)])
