"""The gradient of a loss and the curvature of its layers in one backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from singd_core import curvature as _core
from singd_core.curvature import Measured, shares
from singd_core.rules import Factors
from singd_core.structures import Structure
from singd_jax import _compat, _nnx
from singd_jax._blind import Blind, Curvature
from singd_jax._find import leading
from singd_jax._layer import UPRIGHT, Layer, Role
from singd_jax._layers import Layers, checked
from singd_jax._loss import Leaves, size_of_batch
from singd_jax._measure import Sums, is_blind, measure, slot
from singd_jax._sample import Sample
from singd_jax._state import SingdState, find_states, refuse_lost_curvature
from singd_jax._tapped import Tapped, value_and_grad

# The share of the operations of a gradient that every step may spend on curvature.
_CHEAP = 1.0 / 16.0


def value_and_curvature(
    loss: Callable[..., Any], layers: Layers, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, Curvature]]]:
    """A function of `params, state, *batch` returning the loss, its gradient and the curvature.

    It is `jax.value_and_grad` with one more result, for `tx.update(..., curvature=curvature)`.
    With most structures the curvature has U and G, and `tx.update` multiplies them with K and C.
    With others, such as Toeplitz matrices, it has H_K and H_C. If T > 1, a `lax.cond` between two
    backward passes decides whether the curvature is computed or is zeros. There is no condition if
    measuring costs little beside the gradient: then every step measures.

    Args:
        loss: The loss in which the layers were found.
        layers: What `find_layers` returned.
        has_aux: Whether the loss returns a pair (value, auxiliary output).

    Returns:
        A function of the parameters, the optimizer's state and the batch. It returns the results of
        `jax.value_and_grad` and the curvature. Gradients of parts that are not trained are None.

    Raises:
        ValueError: If the parameters do not fit the layers. If the state has no state of singd in
            it, or a state to which optax would not pass the curvature.
    """
    layers = checked(layers)

    def function(
        params: Any, state: Any, *batch: Any, **keywords: Any
    ) -> tuple[Any, Any, dict[str, Curvature]]:
        state = _nnx.pure(state)
        states = find_states(state)
        known = {k: layer for own in states for k, layer in own.layers.items()}
        with_rows = [name for name, layer in known.items() if layer.has_rows]
        if with_rows:
            refuse_lost_curvature(state)
        if not any(own.fixed.layers.searched for own in states):
            raise ValueError(
                "singd was given no layers and no loss, so there is nothing to measure: give it "
                "singd(loss=loss), and tx.init(params, *batch), or singd(layers=layers); or take "
                "jax.value_and_grad, to learn from gradients alone"
            )
        trained, kept, slots = _ports(layers, states)
        factors = {name: own.measuring() for name, own in kept.items() if not is_blind(own)}
        is_one = kept if with_rows else known.keys() & layers.keys()
        if known and len(layers) and not is_one:
            raise ValueError(
                f"the state has the layers {', '.join(known)}, and the layers are "
                f"{', '.join(layers)}: give both the same layers"
            )
        leaves = Leaves.of(params)
        trained.refuse_others(
            leaves.named, [leaf for layer in trained.values() for leaf in layer.leaves]
        )
        slots = {name: _like(slots[name], layer, leaves) for name, layer in trained.items()}
        if not kept:
            value, grads, changed = value_and_grad(loss, leaves, batch, keywords, has_aux)
            leaves.keep(changed)
            return value, grads, {}
        needed = layers.loss_average == "batch" or layers.kfac_approx == "reduce"
        first = functools.partial(leading, loss, leaves, batch, keywords)
        n = size_of_batch(layers.batch_size, batch, keywords, first) if needed else None
        rows = {name: own.fixed.rows for own in states for name in own.rest.layers}
        dues = [due for own in states if (due := own.due) is not None]
        cheap = _is_cheap(trained, kept, rows, (leaves.named, batch, keywords))
        always = cheap or len(dues) < len(states)
        starts: dict[str, Any] = {}
        for own in states:
            if own.fixed.rows != math.inf:
                starts |= dict.fromkeys(own.rest.layers, Sample.shares(own.rest.step))
        average = n if layers.loss_average == "batch" else layers.loss_average
        rule = functools.partial(measure, kept, rows, average, {})
        tapped, used = Tapped(loss, trained, n, rule, starts), set[str]()

        def measured() -> tuple[Any, Any, Any, dict[str, Curvature]]:
            *found, sums, names = tapped.value_and_grad(
                leaves, slots, factors, batch, keywords, has_aux
            )
            used.update(names)
            return *found, _curvatures(sums, trained, average)

        def plain() -> tuple[Any, Any, Any, dict[str, Curvature]]:
            zeros = _curvatures(slots, trained, average)
            return *value_and_grad(loss, leaves, batch, keywords, has_aux), zeros

        due = always or jnp.any(jnp.stack(dues))
        value, grads, changed, found = _compat.cond(due, measured, plain)
        if not (_compat.is_traced(due) or due):  # nothing was measured, so nobody knows
            used.update(found)
        if not used:
            raise ValueError(
                f"the loss uses none of {', '.join(kept)} as in the loss that the layers were "
                "found in: find the layers of this loss, or give that one"
            )
        leaves.keep(changed)
        return value, grads, {name: own for name, own in found.items() if name in used}

    return function


def _is_cheap(
    layers: Layers, factors: Mapping[str, Factors], rows: Mapping[str, float], arrays: Any
) -> bool:
    """Whether measuring all layers takes few operations beside their products.

    It takes 2 n d w of n rows for a factor of side d with blocks of side w. The products take
    6 N d_out d_in of N rows, forward and backward.
    """
    measuring = products = 0.0
    local = _compat.is_local(arrays)
    for name, layer in layers.items():
        _, d_out, d_in = layer.shape
        products += 6.0 * layer.rows * d_out * d_in
        for S, d in zip(factors[name].structures, (d_in, d_out), strict=True):
            most = max(rows[name], S.width(d)) if local else math.inf
            measuring += 2.0 * min(layer.rows, layer.runs * most) * d * S.width(d)
    return measuring <= _CHEAP * products


@_compat.promoting
def _ports(
    layers: Layers, states: Sequence[SingdState]
) -> tuple[Layers, dict[str, Factors], dict[str, Any]]:
    """The layers that states train by rows, their factors, and zeros for what roles add up."""
    known = {name: factors for own in states for name, factors in own.factors.items()}
    trained = layers.of(known)
    factors = {name: known[name] for name in trained}
    zeros = functools.cache(jnp.zeros)  # one array for all slots of a shape
    slots = {
        name: dict.fromkeys(layer.roles, slot(layer, factors[name], zeros))
        for name, layer in trained.items()
    }
    return trained, factors, slots


def _like(slots: dict[str, Any], layer: Layer, leaves: Leaves) -> dict[str, Any]:
    """The slots of a layer as they are on devices that have weights of their own.

    Autodiff sums over devices what is the same on all of them, and nothing else.
    """
    axes = frozenset[Any]().union(*(_compat.varying(leaves.named[k]) for k in layer.leaves))
    return {role: jax.tree.map(lambda a: _compat.vary(a, axes), own) for role, own in slots.items()}


def blank(layers: Layers, states: Sequence[SingdState]) -> dict[str, Curvature]:
    """Zeros like the curvature of all layers."""
    trained, _, slots = _ports(layers, states)
    return _curvatures(slots, trained, layers.loss_average)


def seen(factors: Factors, curvature: Curvature) -> Curvature:
    """What a refresh of the factors wants of the curvature of their layer."""
    if not is_blind(factors):
        return curvature
    given = Measured(curvature.H_K, curvature.t_U), Measured(curvature.H_C, curvature.t_G)
    K, C = factors.seen(*given)
    return _core.Curvature(K.S, C.S, curvature.t_U, curvature.t_G)


@_compat.promoting
def _curvatures(
    sums: Mapping[str, Mapping[Role, Sums]], layers: Layers, average: str | int | None
) -> dict[str, Curvature]:
    """The curvature of each layer, for each of its roles."""
    return {
        name + role: _curvature(sums[name][role], average, role)
        for name, layer in layers.items()
        for role in layer.roles
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _curvature(sums: Sums, average: str | int | None, role: Role) -> Curvature:
    """The curvature of a loss that is a mean of so many terms; compiled once for equal layers."""
    N, M = sums.counts[..., 0], 1
    if average == "batch+sequence":
        terms, uses = sums.counts[..., 1], sums.counts[..., 2]
        M = terms / jnp.where(uses > 0, uses, 1)
    if isinstance(sums.K, Structure):
        of_K, of_C, *_ = shares(N, M, 1, 1)
        of_K, of_C = (of_K, of_C) if role == UPRIGHT else (of_C, of_K)
        return Blind(sums.K.scale(of_K), sums.C.scale(of_C))
    if role == UPRIGHT:
        return _core.Curvature.of(sums.K, N, sums.C, M)
    turned = _core.Curvature.of(sums.C, N, sums.K, M)
    return _core.Curvature(turned.H_C, turned.H_K, turned.t_G, turned.t_U)


def joined(curvature: Mapping[str, Curvature], layers: Layers) -> dict[str, Curvature]:
    """The curvature of each layer, from the curvatures of its roles."""
    found: dict[str, Any] = {}  # of one layer all blind or none
    for key, (name, _) in layers.curvatures.items():
        if key in curvature:
            c = curvature[key]
            found[name] = found[name].joined(c) if name in found else c
    return found
