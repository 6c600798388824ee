"""SINGD as a transformation of optax."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from singd_core import preconditioner
from singd_core._array import Array, ranged, widen
from singd_core.curvature import Linear
from singd_core.optimizer import LayerState, Optimizer, State
from singd_core.preconditioner import Factors
from singd_core.updates.adamw import Fallback, Moments
from singd_core.updates.curvature import Curvature
from singd_jax._layers import Layer, Layers, pair
from singd_jax._loss import Leaves
from singd_jax._state import SingdState

Rate: TypeAlias = Any  # a number, a 0-d array, or a schedule: a function of the number of steps

_RATES = ("lr", "momentum", "weight_decay", "damping", "alpha1")


def singd(
    learning_rate: Rate = None,
    *,
    layers: Layers,
    structures: Any = None,
    recipe: str = "robust",
    momentum: Rate = None,
    nesterov: bool | None = None,
    weight_decay: Rate = None,
    decoupled_weight_decay: bool | None = None,
    T: Any = None,
    lr_cov: Rate = None,
    damping: Rate = None,
    relative_damping: bool | None = None,
    alpha1: Rate = None,
    kfac_like: bool | None = None,
    normalize_lr_cov: bool | None = None,
    scaled_start: bool | None = None,
    early_averaging: bool | None = None,
    factor_bound: float | None = None,
    order: int | None = None,
    kl_bound: float | None = None,
    rms_bound: float | None = None,
    kfac: bool | None = None,
    preconditioner_dtype: tuple[Any, Any] = (None, None),
    fallback: Fallback | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Structured inverse-free natural gradient descent (arXiv 2312.05705).

    The layers are preconditioned by structured factors of the inverse Fisher matrix; every other
    parameter is trained by AdamW. `print(layers)` shows which is which. A step whose gradient or
    curvature is not finite changes nothing, and is counted in `state.core.skipped`.

    `update` takes the curvature as a keyword, from `value_and_curvature`; without it the factors
    stay as they are. Every rate may be a number, a 0-d array or a schedule.

    Args:
        learning_rate: Learning rate (β₂).
        layers: What `find_layers` returned.
        structures: Of K and C, one for both, or "auto:b"; None takes those of `layers`, or else
            the recipe's.
        recipe: "robust" or "paper": the values of all settings left at None.
        momentum: Momentum of the weights (α₂).
        nesterov: See `singd_core.settings.Settings`, as for all that follow.
        weight_decay: Weight decay (γ) of the preconditioned weights.
        decoupled_weight_decay: Shrink the weights as AdamW does.
        T: Steps between two refreshes of the factors.
        lr_cov: Step size of the factors (β₁).
        damping: Damping (λ).
        relative_damping: `damping` is a share of the curvature's mean diagonal.
        alpha1: Riemannian momentum of the factors (α₁).
        kfac_like: The IKFAC form of the update.
        normalize_lr_cov: The authors' normalization of the factor step.
        scaled_start: Start the factors at the scale of the first curvature.
        early_averaging: Average the first curvatures.
        factor_bound: Bound on the factor step.
        order: Terms of the exponential.
        kl_bound: Bound on the KL divergence of a step.
        rms_bound: Bound on the root mean square of a layer's update.
        kfac: Use KFAC with its inverses, the baseline.
        preconditioner_dtype: Of K and of C; None is the weight's, float32 for float16.
        fallback: Settings of AdamW; its rates may be schedules too.

    Returns:
        The transformation. With `optax.inject_hyperparams` name `order` in `static_args`.

    Raises:
        ValueError: If a setting is out of range or a name unknown.
    """
    given = {
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "lr_cov": lr_cov,
        "damping": damping,
        "relative_damping": relative_damping,
        "alpha1": alpha1,
        "kfac_like": kfac_like,
        "normalize_lr_cov": normalize_lr_cov,
        "scaled_start": scaled_start,
        "early_averaging": early_averaging,
        "factor_bound": factor_bound,
        "order": order,
        "kl_bound": kl_bound,
        "rms_bound": rms_bound,
        "kfac": kfac,
    }
    steps = _Steps(
        layers, structures, recipe, T, preconditioner_dtype, fallback, lr=learning_rate, **given
    )

    def init(params: Any) -> SingdState:
        return steps.init(params)

    def update(
        updates: Any,
        state: SingdState,
        params: Any = None,
        *,
        curvature: Mapping[str, Curvature] | None = None,
        **_: Any,
    ) -> tuple[Any, SingdState]:
        if params is None:
            raise ValueError(
                "singd needs the parameters: tx.update(grads, state, params, curvature=curvature)"
            )
        return steps.update(updates, state, params, curvature)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_singd(
    *,
    layers: Layers,
    structures: Any = None,
    recipe: str = "robust",
    T: Any = None,
    preconditioner_dtype: tuple[Any, Any] = (None, None),
    **given: Any,
) -> optax.GradientTransformationExtraArgs:
    """The bare preconditioner: C Cᵀ ∇W K Kᵀ in place of the gradient of each layer.

    No rate, momentum, decay or bound is applied, and other parameters keep their gradient:
    put it into an `optax.chain`. If anything is not finite, all updates are zero and the factors
    stay as they were.

    Args:
        layers: What `find_layers` returned.
        structures: Of K and C, one for both, or "auto:b"; None takes those of `layers`, or else
            the recipe's.
        recipe: "robust" or "paper": the values of all settings not given.
        T: Steps between two refreshes of the factors.
        preconditioner_dtype: Of K and of C; None is the weight's, float32 for float16.
        **given: Settings of the factors, e.g. `damping` or `lr_cov`, as of `singd`.

    Raises:
        ValueError: If a setting is out of range or a name unknown.
    """
    given |= {"momentum": 0.0, "kl_bound": float("inf"), "rms_bound": float("inf")}
    steps = _Steps(layers, structures, recipe, T, preconditioner_dtype, None, **given)

    def init(params: Any) -> SingdState:
        return steps.init(params, others=False)

    def update(
        updates: Any,
        state: SingdState,
        params: Any = None,
        *,
        curvature: Mapping[str, Curvature] | None = None,
        **_: Any,
    ) -> tuple[Any, SingdState]:
        return steps.precondition(updates, state, curvature)

    return optax.GradientTransformationExtraArgs(init, update)


class _Steps:
    """The core's optimizer on the matrices of the layers."""

    def __init__(
        self,
        layers: Layers,
        structures: Any,
        recipe: str,
        T: Any,
        preconditioner_dtype: tuple[Any, Any],
        fallback: Fallback | None,
        **given: Any,
    ) -> None:
        self.layers = layers
        schedules = {name: given[name] for name in _RATES if callable(given.get(name))}
        started = {name: schedule(0) for name, schedule in schedules.items()}
        # T may be an array (inject_hyperparams makes one), which the core need not know
        counted = T if T is None or isinstance(T, int) else 1
        self.optimizer = Optimizer(
            {},
            recipe=recipe,
            structures=pair(layers.structures if structures is None else structures),
            kfac_approx=layers.kfac_approx,
            loss_average=layers.loss_average,
            preconditioner_dtype=preconditioner_dtype,
            fallback=fallback,
            **given | started | {"T": counted},
        )
        self.schedules = schedules
        self.T = self.optimizer.settings.T if T is None or isinstance(T, int) else T

    def init(self, params: Any, others: bool = True) -> SingdState:
        """The state before the first step."""
        leaves = Leaves.of(params)
        arrays = dict(zip(leaves.names, leaves.arrays, strict=True))
        found = self._present(arrays)
        owned = {name for layer in found.values() for name in layer.leaves}
        dtypes = {name: arrays[layer.weight.name].dtype for name, layer in found.items()}
        # Compiled, so that no array is tied to a device: the core makes them on that of another
        # array, and the second step would be compiled again for what is then tied to it.
        states = jax.jit(
            lambda: {name: self._layer_state(found[name], dtype) for name, dtype in dtypes.items()}
        )()
        rest = {k: _moments(a) for k, a in arrays.items() if others and k not in owned}
        count, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        return SingdState(State(count, skipped, states, rest), self._period())  # type: ignore[arg-type]

    def update(
        self,
        grads: Any,
        state: SingdState,
        params: Any,
        curvature: Mapping[str, Curvature] | None,
    ) -> tuple[Any, SingdState]:
        """The changes of the parameters, and the new state."""
        optimizer, core = self._at(state.core), state.core
        refreshed = self._refreshed(optimizer, state, curvature)
        gradients, tree = _arrays(grads)
        weights, _ = _arrays(params)
        new, stepped = optimizer.update(
            self._matrices(gradients, core),
            core,
            self._matrices(weights, core),
            refreshed=refreshed,
        )
        changes = self._leaves(gradients, core, new)
        return tree(changes), self._counted(core, stepped)

    def precondition(
        self, grads: Any, state: SingdState, curvature: Mapping[str, Curvature] | None
    ) -> tuple[Any, SingdState]:
        """The natural gradients of the layers, and the new state."""
        optimizer, core = self._at(state.core), state.core
        refreshed = self._refreshed(optimizer, state, curvature)
        gradients, tree = _arrays(grads)
        new, total = self._matrices(gradients, core, others=True), jnp.zeros(())
        layers = {}
        for name, matrix in new.items():
            if name in core.layers:
                factors = refreshed.get(name, core.layers[name].factors)
                new[name] = factors.precondition(matrix)
                layers[name] = LayerState(factors, None)
            total = total + jnp.sum(widen(matrix) * widen(new[name]))
        ok = jnp.isfinite(total)
        kept = State(core.step, core.skipped, layers, {}).map(
            lambda new, old: new if new is old else jnp.where(ok, new, old), core
        )
        skipped = core.skipped + (~ok).astype(core.skipped.dtype)
        changes = self._leaves(gradients, core, new)
        changes = {name: jnp.where(ok, a, jnp.zeros_like(a)) for name, a in changes.items()}
        return tree(changes), self._counted(core, dataclasses.replace(kept, skipped=skipped))

    def _at(self, core: State) -> Optimizer:
        """The optimizer with the rates of this step."""
        optimizer = copy.copy(self.optimizer)
        optimizer.layers = {name: Linear() for name in core.layers}  # of matrices
        rates = {name: schedule(core.step) for name, schedule in self.schedules.items()}
        optimizer.settings = dataclasses.replace(optimizer.settings, **rates)
        own = {
            name: value(core.step)
            for name, value in vars(optimizer.fallback).items()
            if callable(value)
        }
        optimizer.fallback = dataclasses.replace(optimizer.fallback, **own)
        return optimizer

    def _refreshed(
        self, optimizer: Optimizer, state: SingdState, curvature: Mapping[str, Curvature] | None
    ) -> dict[str, Factors]:
        core = state.core
        known = {k: c for k, c in (curvature or {}).items() if k in core.layers}
        if not known:
            return {}
        old = {name: core.layers[name].factors for name in known}
        if state.T is None:
            return optimizer.refresh(core, known)
        return jax.lax.cond(  # type: ignore[no-any-return]
            core.step % self.T == 0,
            lambda known, old: optimizer.refresh(core, known),
            lambda known, old: old,
            known,
            old,
        )

    def _counted(self, core: State, stepped: State) -> SingdState:
        step = core.step + 1  # also where nothing else has changed
        return SingdState(dataclasses.replace(stepped, step=step), self._period())

    def _period(self) -> Array | None:
        return None if isinstance(self.T, int) and self.T == 1 else jnp.asarray(self.T, jnp.int32)

    def _layer_state(self, layer: Layer, dtype: Any) -> LayerState:
        optimizer = self.optimizer
        structures = layer.structures(optimizer.structures, kfac=optimizer.settings.kfac)
        own = ranged(jnp.zeros((0,), dtype))
        likes = [own if d is None else jnp.zeros((0,), d) for d in optimizer.preconditioner_dtype]
        factors = preconditioner.init(structures, layer.shape, optimizer.settings, *likes)
        stack, *sides = layer.shape
        momentum = optimizer.settings.momentum
        without = isinstance(momentum, (int, float)) and momentum == 0.0
        buffer = None if without else jnp.zeros((*stack, *sides), own.dtype)
        return LayerState(factors, buffer)

    def _present(self, arrays: Mapping[str, Array]) -> dict[str, Layer]:
        """The layers all of whose leaves are there: masks and frozen parts leave some out."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if all(leaf in arrays for leaf in layer.leaves)
        }

    def _matrices(
        self, arrays: Mapping[str, Array], core: State, others: bool = False
    ) -> dict[str, Array]:
        """The layers as matrices, and the other parameters as they are."""
        layers = {name: self.layers[name].matrix(arrays) for name in core.layers}
        owned = {leaf for name in layers for leaf in self.layers[name].leaves}
        rest = {
            k: a for k, a in arrays.items() if (others or k in core.fallback) and k not in owned
        }
        return layers | rest

    def _leaves(
        self, arrays: Mapping[str, Array], core: State, new: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The leaves of what `_matrices` made."""
        found = dict(arrays)
        for name, value in new.items():
            if name in core.layers:
                found |= self.layers[name].put(found, value)
            else:
                found[name] = value
        return found


def _moments(a: Array) -> Moments:
    """Zeros, sharded like the parameter; their count is on no device in particular."""
    wide = jnp.zeros_like(widen(a))
    return Moments(jnp.zeros_like(a), wide, jnp.zeros((), wide.dtype))


def _arrays(tree: Any) -> tuple[dict[str, Array], Callable[[Mapping[str, Array]], Any]]:
    """The leaves of a pytree by name, and how to put them back."""
    leaves = Leaves.of(tree)
    named = dict(zip(leaves.names, leaves.arrays, strict=True))
    return named, lambda new: leaves.join([new[name] for name in leaves.names])
