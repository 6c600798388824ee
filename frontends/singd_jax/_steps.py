"""The core's optimizer on the layers of a pytree of parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core._array import Array, widen
from singd_core._layer_state import LayerState, Parameter, State, like, parts
from singd_core._parameter import all_finite
from singd_core._settings import arrays_of
from singd_core.rules import Factors
from singd_core.step import next_step
from singd_jax import _compat
from singd_jax._blind import Curvature
from singd_jax._curvature import joined, seen
from singd_jax._layer import Layer
from singd_jax._loss import Leaves
from singd_jax._rates import Rates, Stepper
from singd_jax._state import SingdState

Trained: TypeAlias = Mapping[str, Layer]  # the layers of a state
Known: TypeAlias = Mapping[str, Curvature]


class Steps:
    """Steps of a state, whose layers are each a weight with its bias as their leaves have them."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    @_compat.promoting
    def update(
        self, grads: Any, state: SingdState, params: Any, curvature: Known | None
    ) -> tuple[Any, SingdState]:
        """The changes of the parameters, and the new state.

        Raises:
            ValueError: If there are no parameters, or they or the gradients do not fit the state.
        """
        if params is None:
            raise ValueError(
                "singd needs the parameters: tx.update(grads, state, params, curvature=curvature)"
            )
        core, layers = state.core, state.layers
        needed = [*_owned(layers), *core.fallback]
        gradients, tree = _arrays(grads, state, needed, "gradients")
        weights, _ = _arrays(params, state, needed, "parameters")
        state.fixed.layers.refuse_further(gradients, needed)
        if not needed:  # an empty group
            return grads, self._counted(state, core)
        given, old = (_parameters(layers, a, core.fallback) for a in (gradients, weights))
        known = _known(curvature, state)
        optimizer = self.rates.at(state, layers)
        refreshed = _refreshed(optimizer, state, core, known, given, old)
        new, stepped = optimizer.update(given, core, old, refreshed=refreshed)
        return tree(_leaves(layers, gradients, new)), self._counted(state, stepped)

    @_compat.promoting
    def precondition(
        self, grads: Any, state: SingdState, params: Any, curvature: Known | None
    ) -> tuple[Any, SingdState]:
        """The natural gradients of the layers, and the new state; `params` may be None.

        Raises:
            ValueError: If the gradients do not fit the state.
        """
        del params
        core, layers = state.core, state.layers
        gradients, tree = _arrays(grads, state, _owned(layers), "gradients")
        known = _known(curvature, state)
        given = _parameters(layers, gradients)
        others = [a for name, a in gradients.items() if name not in _owned(layers)]
        optimizer = self.rates.at(state, layers)
        refreshed = _refreshed(optimizer, state, core, known)
        total = sum((jnp.sum(widen(a) ** 2) for a in others), jnp.zeros(()))
        new, kept = {}, {}
        for name, gradient in given.items():
            kind, own = layers[name].laid, parts(gradient)
            factors = refreshed.get(name, core.layers[name].factors)
            natural = factors.precondition(kind.matrix(*own))
            regions = kind.split(natural, own[0].shape, len(own) > 1)
            new[name] = like(gradient, [part for part in regions if part is not None])
            kept[name] = LayerState(factors, None)
            for g, n in zip(own, parts(new[name]), strict=True):
                total = total + jnp.sum(widen(g) * widen(n))
        ok = all_finite([total], arrays_of(optimizer.settings, optimizer.fallback))
        stepped = State(core.step, core.largest_lr, core.skipped, kept, {}).map(
            lambda new, old: new if new is old else jnp.where(ok, new, old), core
        )
        skipped = core.skipped + (~ok).astype(core.skipped.dtype)
        changes = _leaves(layers, gradients, new)
        changes = {name: jnp.where(ok, a, jnp.zeros_like(a)) for name, a in changes.items()}
        return tree(changes), self._counted(state, dataclasses.replace(stepped, skipped=skipped))

    def _counted(self, state: SingdState, stepped: State) -> SingdState:
        step = next_step(state.rest.step)  # also where nothing else has changed
        return state.with_core(dataclasses.replace(stepped, step=step))._replace(T=self.rates.T)


def _known(curvature: Known | None, state: SingdState) -> dict[str, Curvature]:
    """The curvature of the layers of a state.

    Raises:
        ValueError: If there is one of other layers alone.
    """
    layers = state.layers
    given = joined(curvature or {}, state.fixed.layers)
    known = {name: given[name] for name in layers if name in given}
    wanted = [name for name, layer in layers.items() if layer.has_rows]
    if curvature and wanted and not known:
        raise ValueError(
            f"the curvature is of the layers {', '.join(curvature)}, and the state of "
            f"{', '.join(wanted)}: give both the same layers"
        )
    return known


def _refreshed(
    optimizer: Stepper,
    state: SingdState,
    core: State,
    known: Known,
    gradients: Mapping[str, Parameter] | None = None,
    weights: Mapping[str, Parameter] | None = None,
) -> dict[str, Factors]:
    """The factors of layers that have curvature, or show no rows, refreshed if that is due.

    Of layers that show no rows it wants gradients and weights; without, they are left out.
    """

    def refreshed() -> dict[str, Factors]:
        look = functools.partial(optimizer.shared, functools.partial(seen))
        # products of an accelerator may have 8 or 11 bits, and K U K makes their errors larger
        with jax.default_matmul_precision("highest"):
            curvature = {name: look(old[name], own) for name, own in known.items()}
            found = optimizer.refresh(core, curvature)
            if gradients is not None and weights is not None:
                found |= optimizer.refresh_by_gradients(core, gradients, weights)
        return found

    def apart() -> dict[str, Factors]:
        with optimizer.shared.apart():
            return refreshed()

    factors = {name: own.factors for name, own in core.layers.items()}
    old = {
        name: own
        for name, own in factors.items()
        if name in known or not (own.has_rows or gradients is None)
    }
    if not old or state.T is None:
        return refreshed() if old else {}
    return _compat.cond(state.due, apart, lambda: old)


def _owned(layers: Trained) -> list[str]:
    """The leaves of layers."""
    return [leaf for layer in layers.values() for leaf in layer.leaves]


def _arrays(
    tree: Any, state: SingdState, needed: Sequence[str], what: str
) -> tuple[dict[str, Array], Callable[[Mapping[str, Array]], Any]]:
    """The leaves of a pytree by name, and how to put them back."""
    leaves = Leaves.of(tree)
    state.fixed.layers.refuse_others(leaves.named, needed, what)
    return leaves.named, lambda new: leaves.join([new[name] for name in leaves.names])


def _parameters(
    layers: Trained, arrays: Mapping[str, Array], others: Mapping[str, Any] | None = None
) -> dict[str, Parameter]:
    """The layers as weights with biases, and the other parameters as they are."""
    found = {name: layer.parameter(arrays) for name, layer in layers.items()}
    return found | {name: arrays[name] for name in others or ()}


def _leaves(
    layers: Trained, arrays: Mapping[str, Array], new: Mapping[str, Parameter]
) -> dict[str, Array]:
    """The leaves of what `_parameters` made, and those that it left out."""
    found = dict(arrays)
    for part in (part for layer in layers.values() for part in layer.parts):
        if not part.whole:  # what no layer uses stays as it is
            found[part.name] = jnp.zeros_like(arrays[part.name])
    for name, value in new.items():
        if name in layers:
            found |= layers[name].put(found, value)
        else:
            found[name] = value
    return found
