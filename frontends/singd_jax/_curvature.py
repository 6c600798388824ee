"""The gradient of a loss and the curvature of its layers in one backward pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from singd_core._array import Array, widen
from singd_core.curvature import Curvature, Measured
from singd_core.rules import Factors
from singd_core.structures import Structure
from singd_core.structures.choose import MatrixShape
from singd_jax import _compat, _nnx
from singd_jax._calls import Call
from singd_jax._find import leading
from singd_jax._layer import TRANSPOSED, UPRIGHT, Layer, Role
from singd_jax._layers import Layers, checked
from singd_jax._loss import Leaves, size_of_batch
from singd_jax._sample import Sample
from singd_jax._state import SingdState, find_states, refuse_lost_curvature
from singd_jax._tapped import Tapped, value_and_grad

# The share of the operations of a gradient that every step may spend on curvature.
_CHEAP = 1.0 / 16.0


class Sums(NamedTuple):
    """What the taps of a layer add up, the stack's axes first.

    The inputs are counted in the rows that the layer was found with, so their number is 1 where
    XLA knows it, and scaling by it later costs nothing.

    Attributes:
        K: The mean over the rows of K, which are inputs unless the matrix is used transposed.
        C: The sum over those of C, times the number of terms of the loss where it is a number.
        counts: The number of rows in units of those found, the number of rows if every position
            is one, and the number of products, each counted once however often it runs: shape
            (*stack, 3).
    """

    K: Measured
    C: Measured
    counts: Array


def value_and_curvature(
    loss: Callable[..., Any], layers: Layers, *, has_aux: bool = False, branch: str | None = None
) -> Callable[..., tuple[Any, Any, dict[str, Curvature]]]:
    """A function of `params, state, *batch` returning the loss, its gradient and the curvature.

    It is `jax.value_and_grad` with one more result, for `tx.update(..., curvature=curvature)`.
    Most structures measure U and G themselves, and `tx.update` sees them by K and C; others, such
    as Toeplitz matrices, measure H_K and H_C.

    Args:
        loss: The loss that the layers were found in.
        layers: What `find_layers` returned.
        has_aux: Whether the loss returns a pair (value, auxiliary output).
        branch: What decides, where T > 1, whether the curvature is computed, or else is zeros:
            "step", one `lax.cond` between two backward passes, or "layer", one in every layer. The
            latter compiles one backward pass instead of two; but each branch is a wait for an
            accelerator, and devices add up the curvature of each layer by itself. None is "step",
            and nothing where measuring costs little beside the gradient: there every step measures.

    Returns:
        A function of the parameters, the optimizer's state and the batch. The value is that of
        `jax.value_and_grad`; gradients of what is not trained are None.

    Raises:
        ValueError: If `branch` is unknown, or the state has no state of singd in it, or one that
            optax would not pass the curvature on to; or if the parameters do not fit the layers.
    """
    if branch not in (None, "step", "layer"):
        raise ValueError(f'branch = {branch!r}: choose "step", "layer" or None')
    layers = checked(layers)

    def function(
        params: Any, state: Any, *batch: Any, **keywords: Any
    ) -> tuple[Any, Any, dict[str, Curvature]]:
        state = _nnx.pure(state)
        states = find_states(state)
        refuse_lost_curvature(state)
        trained = layers.of(states)
        kept, slots = _ports(trained, states)
        factors = {name: own.measuring() for name, own in kept.items() if not is_blind(own)}
        known = [k for own in states for k, layer in own.layers.items() if layer.has_rows]
        if known and len(layers) and not kept:
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
        rows = {name: own.fixed.rows for own in states for name in own.rest.layers}
        always = branch is None and _is_cheap(trained, kept, rows)
        dues: list[Any] = [None if always else own.due for own in states]
        whole = branch == "layer" or any(due is None for due in dues)
        due = {} if always or not whole else _of_layers(states, dues)
        sampled = [own for own in states if own.fixed.rows != math.inf]
        shares = [Sample.shares(own.rest.step) for own in sampled]
        starts = _of_layers(sampled, shares)
        average = n if layers.loss_average == "batch" else layers.loss_average
        rule = functools.partial(_measure, kept, rows, average, {})
        tapped, used = Tapped(loss, trained, n, rule, due, starts), set[str]()

        def measured() -> tuple[Any, Any, Any, dict[str, Curvature]]:
            *found, sums, names = tapped.value_and_grad(
                leaves, slots, factors, batch, keywords, has_aux
            )
            used.update(names)
            return *found, _curvatures(sums, trained, average)

        def plain() -> tuple[Any, Any, Any, dict[str, Curvature]]:
            zeros = _curvatures(slots, trained, average)
            return *value_and_grad(loss, leaves, batch, keywords, has_aux), zeros

        if whole:
            value, grads, changed, found = measured()
        else:
            value, grads, changed, found = jax.lax.cond(jnp.any(jnp.stack(dues)), measured, plain)
        if kept and not used:
            raise ValueError(
                f"the loss uses none of {', '.join(kept)} as in the loss that the layers were "
                "found in: find the layers of this loss, or give that one"
            )
        leaves.keep(changed)
        return value, grads, {name: own for name, own in found.items() if name in used}

    return function


def _of_layers(states: Sequence[SingdState], values: Sequence[Any]) -> dict[str, Any]:
    """The value of each state for its layers."""
    pairs = zip(states, values, strict=True)
    return {name: value for own, value in pairs for name in own.rest.layers}


def _is_cheap(layers: Layers, factors: Mapping[str, Factors], rows: Mapping[str, float]) -> bool:
    """Whether measuring all layers takes few operations beside their products.

    It takes 2 n d w of n rows for a factor of side d with blocks of side w. The products take
    6 N d_out d_in of N rows, forward and backward.
    """
    measuring = products = 0.0
    for name, layer in layers.items():
        _, d_out, d_in = layer.shape
        products += 6.0 * layer.rows * d_out * d_in
        for S, d in zip(factors[name].structures, (d_in, d_out), strict=True):
            most = max(rows[name], S.width(d)) if _compat.is_local() else math.inf
            measuring += 2.0 * min(layer.rows, layer.runs * most) * d * S.width(d)
    return measuring <= _CHEAP * products


def _measure(
    trained: Mapping[str, Factors],
    rows: Mapping[str, float],
    average: str | int | None,
    known: dict[Any, Callable[..., Sums]],
    call: Call,
    layer: Layer,
    kfac_approx: str,
) -> Callable[..., Sums]:
    """The rule that measures so many of the rows, or all, for the layer's factors.

    It is one function for equal products of equal layers, `known` by what they have in common.
    """
    transposed, bias = layer.role(call) == TRANSPOSED, layer.bias is not None
    _, d_out, d_in = layer.shape
    most = rows[layer.name] if _compat.is_local() else math.inf
    N = call.examples if kfac_approx == "reduce" else call.rows
    unit = max(layer.rows, 1)
    counted, structures = (N / unit, call.rows, 1.0 / call.times), trained[layer.name].structures
    M = average if isinstance(average, int) else 1

    def rule(x: Any, g: Any, factors: Factors | None, starts: Array | None, factor: Any) -> Sums:
        x, g = call.operands(x, g, factor)
        of_K, of_C = (
            Sample.of(most, structure, d, starts)
            for structure, d in zip(structures, (d_in, d_out), strict=True)
        )
        of_x, of_g = (of_C, of_K) if transposed else (of_K, of_C)
        A = call.inputs(x, bias and not transposed, kfac_approx, of_x)
        B = call.outputs(g, kfac_approx, of_g)
        counts = jnp.broadcast_to(jnp.asarray(counted, jnp.float32), (*B.shape[:-2], 3))
        if call.sizes is not None:
            counts = counts.at[..., 0].set(call.sizes(x) / unit)
        scales = 1.0 / unit, float(M)
        if transposed:
            A, B, scales = padded(B) if bias else B, A, scales[::-1]
        return Sums(*_sums(structures, factors, A, B, scales), counts)

    if call.code is None:
        return rule
    same = call.code, layer.shape, transposed, bias, structures, most, counted, M, kfac_approx
    return known.setdefault(same, jax.jit(rule))


@_compat.promoting
def _ports(
    layers: Layers, states: Sequence[SingdState]
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors of each layer, and zeros for what its roles add up."""
    known = {name: factors for own in states for name, factors in own.factors.items()}
    factors = {name: known[name] for name in layers}
    slots = {
        name: dict.fromkeys(layer.roles, _slot(layer, factors[name]))
        for name, layer in layers.items()
    }
    return factors, slots


def blank(layers: Layers, states: Sequence[SingdState]) -> dict[str, Curvature]:
    """Zeros like the curvature of all layers."""
    trained = layers.of(states)
    _, slots = _ports(trained, states)
    return _curvatures(slots, trained, layers.loss_average)


def _slot(layer: Layer, factors: Factors) -> Sums:
    """Zeros of the shapes that `measure` returns, to add many up in: in at least float32."""
    arrays, tree = jax.tree.flatten(factors.measuring())
    shapes = _shapes(layer.shape, tree, tuple((a.shape, a.dtype) for a in arrays))
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )


@functools.cache
def _shapes(shape: MatrixShape, tree: Any, arrays: tuple[Any, ...]) -> Sums:
    """What a layer's taps add up, from what its factors measure with."""
    stack, d_out, d_in = shape

    def shaped(factors: Factors) -> Sums:
        sides = zip((d_in, d_out), factors.sides, strict=True)
        A, B = (jnp.zeros((*stack, 1, d), widen(L.like).dtype) for d, L in sides)
        counts = jnp.zeros((*stack, 3), jnp.float32)
        return Sums(
            *_sums(factors.structures, None if is_blind(factors) else factors, A, B), counts
        )

    # as on one device: their products need no type that says how they are sharded
    make: Any = jax.ShapeDtypeStruct
    plain = tree.unflatten([make(*a) for a in arrays])
    return jax.eval_shape(shaped, plain)  # type: ignore[no-any-return]


def _sums(
    structures: tuple[type[Structure], type[Structure]],
    factors: Factors | None,
    A: Array,
    B: Array,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Measured, Measured]:
    """The sums of rows A and B times the scales, blind if there are no factors."""
    of_A, of_B = scales
    if factors is not None:
        K, C = factors.measure(A, B)
        return K.map(lambda a: a * of_A), C.map(lambda a: a * of_B)
    # in float32: what rounds the sums is large where a factor is
    S_K, S_C = structures
    return Measured(*S_K.summed(widen(A), of_A)), Measured(*S_C.summed(widen(B), of_B))


def is_blind(factors: Factors) -> bool:
    """Whether the curvature of a layer is that of K = C = I, which `seen` turns into its own.

    Then it needs no factors, and is the same code for all layers of a loss. Some structures do not
    keep enough of it.
    """
    return all(S.sums() is S for S in factors.structures)


def seen(factors: Factors, curvature: Curvature) -> Curvature:
    """What a refresh of the factors wants of the curvature of their layer."""
    if not is_blind(factors):
        return curvature
    given = Measured(curvature.H_K, curvature.t_U), Measured(curvature.H_C, curvature.t_G)
    K, C = factors.seen(*given)
    return dataclasses.replace(curvature, H_K=K.S, H_C=C.S)


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
    N, terms, uses = (sums.counts[..., i] for i in range(3))
    M: Any = 1
    if average == "batch+sequence":
        M = terms / jnp.where(uses > 0, uses, 1)
    if role == UPRIGHT:
        return Curvature.of(sums.K, N, sums.C, M)
    turned = Curvature.of(sums.C, N, sums.K, M)
    return Curvature(turned.H_C, turned.H_K, turned.t_G, turned.t_U)


def joined(curvature: Mapping[str, Curvature], layers: Layers) -> dict[str, Curvature]:
    """The curvature of each layer, from the curvatures of its roles."""
    found: dict[str, Curvature] = {}
    for key, (name, _) in layers.curvatures.items():
        if key in curvature:
            c = curvature[key]
            found[name] = found[name].joined(c) if name in found else c
    return found


def padded(rows: Array) -> Array:
    """Rows of K with a zero for the bias, which a transposed use does not see."""
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, 1)])
