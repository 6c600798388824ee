"""Gradients that carry the curvature with them."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from singd_core._array import Array
from singd_jax._blind import Curvature
from singd_jax._curvature import value_and_curvature
from singd_jax._state import Both, SingdState, find_state, find_states, holds_state

# So small that no norm of a gradient sees it beside the gradient, and so large that float32 holds
# the curvature times it.
_UNIT = 2.0**-48
# What becomes of these numbers tells a multiple or a sum from anything else: along each axis, by
# sign and by size. Rounding to bfloat16 changes them by less than the tolerance.
_PATTERN = ((1.0, -2.0), (4.0, -8.0))
_TOLERANCE = 2.0**-5


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("tree", "carried", "unit"), meta_fields=()
)
@dataclass(frozen=True)
class Gradients:
    """What `singd_jax.value_and_grad` returns: a pytree of the gradients and the curvature.

    Sums, means (`jax.lax.pmean`) and multiples of it change the gradients and the curvature alike.
    `unit` changes with them, and at the end the curvature is divided by it. So the mean curvature
    is left after a mean or a sum over micro-batches, after clipping by the norm, and after
    unscaling. It is also left after clipping by value, because the bound is far above the carried
    numbers. Any other map, such as a sign or added noise, makes the curvature NaN. `tx.update` then
    skips the step and counts it: apply such a map to `tree` alone. The norm of this pytree is the
    norm of the gradients.

    Attributes:
        tree: The gradients, like the parameters.
        carried: The curvature of each layer times `unit`.
        unit: Small numbers, shape (2, 2). Multiples and sums keep their proportions.
    """

    tree: Any
    carried: dict[str, Curvature]
    unit: Array

    @classmethod
    def of(cls, tree: Any, curvature: Mapping[str, Curvature]) -> Gradients:
        """Of gradients and the curvature that belongs to them."""
        small = jax.tree.map(lambda a: a * _UNIT, dict(curvature))
        return cls(tree, small, _UNIT * jnp.asarray(_PATTERN, jnp.float32))

    @property
    def curvature(self) -> dict[str, Curvature]:
        """The curvature: the mean over what was summed; NaN if anything else was done to it.

        Raises:
            ValueError: If it was rounded to float16, which does not hold it.
        """
        if self.unit.dtype == jnp.float16:
            raise ValueError(
                "gradients of singd_jax.value_and_grad were cast to float16, in which their "
                "curvature is 0: cast to bfloat16, or only their `tree`"
            )
        one, pattern = self.unit[:1, :1], jnp.asarray(_PATTERN, self.unit.dtype)
        kept = jnp.all(jnp.abs(self.unit - one * pattern) <= _TOLERANCE * jnp.abs(one * pattern))
        unit = jnp.where(kept, one[0, 0], jnp.nan)
        return {
            name: jax.tree.map(lambda a: a / unit.astype(a.dtype), own)
            for name, own in self.carried.items()
        }

    def __contains__(self, key: Any) -> bool:
        return key in self.tree

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tree)


MISSING: Any = object()  # where no curvature was given, not even None


def parted(updates: Any, curvature: Any) -> tuple[Any, Any]:
    """The gradients, and the curvature that they carry unless it is given."""
    if not isinstance(updates, Gradients):
        return updates, curvature
    return updates.tree, updates.curvature if curvature is MISSING else curvature


def value_and_grad(
    loss: Callable[..., Any], *, has_aux: bool = False, branch: str | None = None
) -> Callable[..., tuple[Any, Gradients]]:
    """`jax.value_and_grad` whose gradients carry the curvature to `tx.update`.

    The gradients are a pytree. You may average them over devices or micro-batches, clip them by
    their norm, or hand them to `TrainState.apply_gradients(grads=grads)`. `grads.tree` are the
    gradients alone. Transformations that map gradients and parameters together, e.g. `optax.masked`
    or `optax.add_decayed_weights` before singd in a chain, need `value_and_curvature`.

    Args:
        loss: The loss `loss(params, *batch)`. It may be another function than the loss in which the
            layers were found, e.g. a closure made in a training step, if it uses the layers alike.
        has_aux: Whether the loss returns a pair (value, auxiliary output).
        branch: As in `value_and_curvature`.

    Returns:
        A function of the parameters, the optimizer's state and the batch.

    Raises:
        ValueError: If the state has no state of singd in it, or several.

    Example:
        >>> from singd_jax import singd
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
        >>> tx = singd(loss=loss)
        >>> state = tx.init(params, x)
        >>> value, grads = value_and_grad(loss)(params, state, x)
        >>> updates, state = tx.update(grads, state, params)
    """

    def function(params: Any, state: Any, *batch: Any, **keywords: Any) -> tuple[Any, Gradients]:
        layers = find_state(state).fixed.layers
        _refuse_pairing(state, params)
        both = value_and_curvature(loss, layers, has_aux=has_aux, branch=branch)
        value, grads, curvature = both(params, state, *batch, **keywords)
        return value, Gradients.of(grads, curvature)

    return function


# What optax wraps around singd to map gradients together with a mask, with what it accumulates, or
# with the updates.
_PAIRING = (
    optax.MaskedState,
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.contrib.MechanicState,
)


def _refuse_pairing(state: Any, params: Any) -> None:
    """Raise if optax would map the gradients together with other trees."""

    def is_in_the_way(node: Any) -> bool:
        ours = isinstance(node, optax.MultiStepsState) and isinstance(node.acc_grads, Both)
        return isinstance(node, _PAIRING) and not ours and holds_state(node)

    around = [n for n in jax.tree.leaves(state, is_leaf=is_in_the_way) if is_in_the_way(n)]
    has_rows = any(layer.has_rows for own in find_states(state) for layer in own.layers.values())
    for node in [*around, *_paired_before(state, jax.tree.structure(params))]:
        if not has_rows:
            raise ValueError(
                f"{type(node).__name__}: optax maps gradients together with other trees there. No "
                "layer has rows, so there is no curvature: take the gradients of jax.value_and_grad"
            )
        steps = isinstance(node, optax.MultiStepsState)
        instead = "take singd_jax.MultiSteps(..., layers=layers) in its place, or "
        raise ValueError(
            f"{type(node).__name__}: optax maps gradients together with other trees there, and "
            f"they cannot carry the curvature: {instead if steps else ''}give tx.update(grads, "
            "state, params, curvature=curvature) what singd_jax.value_and_curvature returns"
        )


def _paired_before(state: Any, like: Any) -> list[Any]:
    """The states of optax that come before singd's in chains and hold trees like the parameters.

    So does `optax.masked`, while it maps. `optax.zero_nans` would put the gradients in the place of
    such a tree, and would not leave NaN in the curvature, which skips a step.
    """
    one = jax.tree.structure(0)  # a number in a state is no sign that it is like one array

    def is_like(part: Any) -> bool:
        return like != one and bool(jax.tree.structure(part) == like)

    def pairs(node: Any) -> bool:
        of_optax = type(node).__module__.startswith("optax.")
        known = isinstance(node, (optax.ZeroNansState, optax.MaskedState))
        return of_optax and (known or any(map(is_like, jax.tree.leaves(node, is_leaf=is_like))))

    if isinstance(state, SingdState) or not isinstance(state, (tuple, OrderedDict)):
        return []
    found: list[Any] = []
    for part in state.values() if isinstance(state, OrderedDict) else state:
        if holds_state(part):
            return found + _paired_before(part, like)
        found += [node for node in jax.tree.leaves(part, is_leaf=pairs) if pairs(node)]
    return []
