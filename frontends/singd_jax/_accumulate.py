"""Gradient accumulation that accumulates the curvature too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from singd_core._array import Array
from singd_jax import _compat
from singd_jax._blind import Curvature
from singd_jax._curvature import blank
from singd_jax._gradients import MISSING, parted
from singd_jax._layer import TRANSPOSED, Role
from singd_jax._layers import Layers, checked
from singd_jax._loss import Leaves, is_complex
from singd_jax._state import Both, find_states


class MultiSteps(optax.MultiSteps):  # type: ignore[misc]
    """`optax.MultiSteps` that averages the curvature over micro-batches, like the gradient.

    A step of k micro-batches equals a step of one large batch. Optax's own `MultiSteps` hands on
    the curvature of the last micro-batch with the gradient of all.

    Args:
        opt: A transformation with `singd` or `scale_by_singd` in it.
        every_k_schedule: As in optax: the number k, or a function of the number of steps.
        layers: What `find_layers` returned.
        should_skip_update_fn: As in optax. It gets the gradient alone.
        accumulator_dtype: As in optax, for the gradient and the curvature.

    The gradients are averaged, or added up where the loss is a sum (`loss_average=None`).

    Example:
        >>> from singd_jax import find_layers, singd
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
        >>> layers = find_layers(loss)(params, x[:4])
        >>> tx = MultiSteps(singd(0.1, layers=layers), 2, layers=layers)

    Inside another transformation, e.g. `optax.chain`, put its `gradient_transformation()`.
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[Array], Array],
        *,
        layers: Layers,
        should_skip_update_fn: Callable[..., Any] | None = None,
        accumulator_dtype: Any = jnp.float32,
    ) -> None:
        inner, mean = optax.with_extra_args_support(opt), checked(layers).loss_average is not None
        self._layers = layers

        def update(both: Both, state: Any, params: Any, micro_batches: Array, **extra: Any) -> Any:
            curvature = both.curvature
            if not mean:  # inputs are averaged whatever the loss is
                curvature = {
                    key: _with_mean(role, curvature[key], micro_batches)
                    for key, (_, role) in layers.curvatures.items()
                    if key in curvature
                }
            return inner.update(both.gradient, state, params, curvature=curvature, **extra)

        def skip(updates: Any, *args: Any) -> Any:
            gradient = updates.gradient if isinstance(updates, Both) else updates
            return should_skip_update_fn(gradient, *args)  # type: ignore[misc]

        super().__init__(
            optax.GradientTransformationExtraArgs(inner.init, update),
            every_k_schedule,
            use_grad_mean=mean,
            should_skip_update_fn=skip if should_skip_update_fn is not None else None,
            accumulator_dtype=accumulator_dtype,
        )

    def init(self, params: Any) -> Any:
        """The state before the first micro-batch.

        Raises:
            ValueError: If a parameter is complex: optax drops the imaginary part.
        """
        for name, array in Leaves.of(params).named.items():
            if is_complex(array):
                raise ValueError(
                    f"{name} is complex, and optax.MultiSteps accumulates real numbers: accumulate "
                    "inside the loss, e.g. by lax.scan over micro-batches"
                )
        state = super().init(params)
        zeros = blank(self._layers, find_states(state.inner_opt_state))
        zeros = jax.tree.map(lambda a: a.astype(self._accumulator_dtype), zeros)
        return state._replace(acc_grads=Both(state.acc_grads, zeros))

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        curvature: Mapping[str, Curvature] | None = MISSING,
        **extra: Any,
    ) -> Any:
        """The changes after the last micro-batch of a step, zeros after the others.

        Raises:
            ValueError: If no curvature is given and layers have rows, or if it is of other layers.
        """
        updates, curvature = parted(updates, curvature)
        wanted = state.acc_grads.curvature
        if wanted and (curvature is None or curvature is MISSING):
            raise ValueError(
                "singd_jax.MultiSteps accumulates the curvature: give tx.update(grads, state, "
                "params, curvature=curvature) the curvature of value_and_curvature, and put its "
                "gradient_transformation() where it is part of another transformation"
            )
        own = {}
        for name in wanted:  # of several groups the own one
            if name not in curvature:
                raise ValueError(
                    f"the curvature has no {name!r}, which singd_jax.MultiSteps accumulates: give "
                    "value_and_curvature the same layers and the loss that they were found in"
                )
            own[name] = curvature[name]
        both, n = Both(updates, own), state.mini_step + 1
        update = _compat.promoting(super().update)  # optax divides float32 by int32
        changes, state = update(both, state, params, micro_batches=n, **extra)
        # optax empties what it has accumulated by a product with 0, which NaN survives
        begins = state.mini_step == 0
        kept = jax.tree.map(lambda a: jnp.where(begins, 0, a).astype(a.dtype), state.acc_grads)
        return changes, state._replace(acc_grads=kept)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """The same as a part of others, e.g. of `optax.chain`; optax's own drops the curvature."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


def _with_mean(role: Role, curvature: Curvature, n: Array) -> Curvature:
    """The sum of n curvatures with the part of the inputs as their mean."""
    H, t = ("H_C", "t_G") if role == TRANSPOSED else ("H_K", "t_U")
    found = {H: getattr(curvature, H).scale(1.0 / n)}
    if t in curvature.field_names():
        found[t] = getattr(curvature, t) / n
    return dataclasses.replace(curvature, **found)
