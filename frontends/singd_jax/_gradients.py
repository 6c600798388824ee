"""Gradients that carry the curvature with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_core.rounding import hashed
from singd_jax import _compat
from singd_jax._blind import Curvature
from singd_jax._curvature import value_and_curvature
from singd_jax._loss import Leaves
from singd_jax._pairing import refuse_pairing
from singd_jax._state import find_state

# So small that no norm of a gradient sees it beside the gradient, and so large that float32 holds
# the curvature times it.
_UNIT = 2.0**-48
# What becomes of these numbers tells a multiple or a sum from anything else: along each axis, by
# sign and by size. Rounding to bfloat16 changes them by less than the tolerance.
_PATTERN = ((1.0, -2.0), (4.0, -8.0))
_TOLERANCE = 2.0**-5


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tree", "carried", "unit", "signs"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Gradients:
    """What `singd_jax.value_and_grad` returns: a pytree of the gradients and the curvature.

    Sums, means (`jax.lax.pmean`) and multiples of it change the gradients and the curvature alike.
    `unit` changes with them, and at the end the curvature is divided by it. So the mean curvature
    is left after a mean or a sum over micro-batches, and after clipping by the norm. After
    unscaling, the curvature of the scaled loss is left. Clipping by value changes no curvature
    either, because the bound is far above the carried numbers. Any other map, such as a sign, added
    noise or 2 g - h, makes the curvature NaN. `tx.update` then skips the step and counts it: apply
    such a map to `tree` alone. The norm of this pytree is the norm of the gradients.

    Attributes:
        tree: The gradients, like the parameters.
        carried: The curvature of each layer times `unit`.
        unit: Small numbers, shape (2, 2). Multiples and sums keep their proportions.
        signs: Plus or minus the first of them, shape (32,), other signs for other gradients. Their
            sums are at most the sum of the first numbers, unless a weight is negative.
    """

    tree: Any
    carried: dict[str, Curvature]
    unit: Array
    signs: Array

    @classmethod
    def of(cls, tree: Any, curvature: Mapping[str, Curvature], own: Sequence[Array]) -> Gradients:
        """Of gradients, the curvature that belongs to them, and their arrays of its layers."""
        small = jax.tree.map(lambda a: a * _UNIT, dict(curvature))
        return cls(tree, small, _UNIT * jnp.asarray(_PATTERN, jnp.float32), _UNIT * _signs(own))

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
        kept &= jnp.all(jnp.abs(self.signs) <= (1.0 + _TOLERANCE) * jnp.abs(one[0]))
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


@_compat.promoting
def _signs(gradients: Sequence[Array]) -> Array:
    """32 signs that are others for other gradients, as far as their smallest array tells."""
    known = [a for a in gradients if a.size]
    if not known:
        return jnp.zeros(32, jnp.float32)
    # no wider over a mesh than it must be, and next to nothing to read
    least = min(known, key=lambda a: (len(_compat.varying(a)), a.size))
    size = jnp.sum(jnp.abs(jax.lax.stop_gradient(least)).astype(jnp.float32))
    bits = hashed(jax.lax.bitcast_convert_type(size, jnp.int32)) >> jnp.arange(32, dtype=jnp.int32)
    return 1.0 - 2.0 * (bits & 1).astype(jnp.float32)


MISSING: Any = object()  # where no curvature was given, not even None


def parted(updates: Any, curvature: Any) -> tuple[Any, Any]:
    """The gradients, and the curvature that they carry unless it is given."""
    if not isinstance(updates, Gradients):
        return updates, curvature
    return updates.tree, updates.curvature if curvature is MISSING else curvature


def value_and_grad(
    loss: Callable[..., Any], *, has_aux: bool = False
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
        refuse_pairing(state, params)
        both = value_and_curvature(loss, layers, has_aux=has_aux)
        value, grads, curvature = both(params, state, *batch, **keywords)
        own = {leaf for key in curvature for leaf in layers[layers.curvatures[key][0]].leaves}
        named = Leaves.of(grads).named
        return value, Gradients.of(grads, curvature, [named[n] for n in sorted(own & named.keys())])

    return function
