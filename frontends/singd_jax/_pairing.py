"""What of optax cannot take gradients that carry their curvature."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import optax  # type: ignore[import-untyped]

from singd_jax._state import Both, SingdState, find_states, holds_state

# What optax wraps around singd to map gradients together with a mask, with what it accumulates,
# with the updates or with the parameters.
_PAIRING = (
    optax.MaskedState,
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.contrib.MechanicState,
    optax.contrib.SAMState,
)
# What may hold no tree like the parameters, and still does to the curvature what no multiple does.
_SPOILING = optax.ZeroNansState, optax.MaskedState, optax.AddNoiseState

_EXPLICIT = (
    "give tx.update(grads, state, params, curvature=curvature) what "
    "singd_jax.value_and_curvature returns"
)


def refuse_pairing(state: Any, params: Any) -> None:
    """Raise if optax would map the gradients together with other trees, or add noise to them.

    Raises:
        ValueError: Naming the state of the transformation, and the other way.
    """

    def is_in_the_way(node: Any) -> bool:
        ours = isinstance(node, optax.MultiStepsState) and isinstance(node.acc_grads, Both)
        return isinstance(node, _PAIRING) and not ours and holds_state(node)

    around = [n for n in jax.tree.leaves(state, is_leaf=is_in_the_way) if is_in_the_way(n)]
    has_rows = any(layer.has_rows for own in find_states(state) for layer in own.layers.values())
    for node in [*around, *_paired_before(state, jax.tree.structure(params))]:
        if has_rows:
            raise ValueError(f"{type(node).__name__}: {_reason(node)}")
        if not isinstance(node, optax.AddNoiseState):  # there is no curvature to spoil
            raise ValueError(
                f"{type(node).__name__}: optax maps gradients together with other trees there. No "
                "layer has rows, so there is no curvature: take the gradients of jax.value_and_grad"
            )


def _reason(node: Any) -> str:
    """Why a transformation with this state takes no gradients with a curvature, and what does."""
    if isinstance(node, optax.AddNoiseState):
        return (
            "optax adds noise to the curvature too that the gradients carry: add it to grads.tree "
            f"before tx.update, or {_EXPLICIT}"
        )
    why = "optax maps gradients together with other trees there, and they cannot carry the"
    if isinstance(node, optax.contrib.SAMState):
        return (
            f"{why} curvature; nor does optax.contrib.sam pass it on: put singd() without layers "
            "into it, and take the gradients of jax.value_and_grad"
        )
    steps = isinstance(node, optax.MultiStepsState)
    instead = "take singd_jax.MultiSteps(..., layers=layers) in its place, or " if steps else ""
    return f"{why} curvature: {instead}{_EXPLICIT}"


def _paired_before(state: Any, like: Any) -> list[Any]:
    """The states of optax that come before singd's in chains and hold trees like the parameters.

    So does `optax.masked`, while it maps. `optax.zero_nans` would put the gradients in the place of
    such a tree, and would not leave NaN in the curvature, which skips a step. `optax.add_noise`
    would have every step skipped.
    """
    one = jax.tree.structure(0)  # a number in a state is no sign that it is like one array

    def is_like(part: Any) -> bool:
        return like != one and bool(jax.tree.structure(part) == like)

    def pairs(node: Any) -> bool:
        of_optax = type(node).__module__.startswith("optax.")
        known = isinstance(node, _SPOILING)
        return of_optax and (known or any(map(is_like, jax.tree.leaves(node, is_leaf=is_like))))

    if isinstance(state, SingdState) or not isinstance(state, (tuple, OrderedDict)):
        return []
    found: list[Any] = []
    for part in state.values() if isinstance(state, OrderedDict) else state:
        if holds_state(part):
            return found + _paired_before(part, like)
        found += [node for node in jax.tree.leaves(part, is_leaf=pairs) if pairs(node)]
    return []
