"""The core's optimizer on the layers of a pytree of parameters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core import rules
from singd_core._array import Array, ranged, widen
from singd_core._layer_state import Parameter, begun, like, no_cost, parts
from singd_core._settings import Settings
from singd_core._tree import T_Tree
from singd_core.adamw import Fallback, Moments
from singd_core.curvature import Curvature
from singd_core.optimizer import LayerState, Optimizer, State
from singd_core.rules import Factors
from singd_jax import _compat
from singd_jax._curvature import joined
from singd_jax._find import find_layers
from singd_jax._layers import Layer, Layers, checked, pair
from singd_jax._loss import Leaves
from singd_jax._pytree import register_with_flax
from singd_jax._sharding import shardings
from singd_jax._state import Fixed, SingdState
from singd_jax._tensors import NONE, extended, tensors

Rate: TypeAlias = Any  # a number, a 0-d array, or a schedule: a function of the number of steps

_RATES = ("lr", "momentum", "weight_decay", "damping", "alpha1")


class _Optimizer(Optimizer):
    def _if(
        self, condition: Any, function: Callable[..., T_Tree], old: T_Tree, *arrays: Array
    ) -> T_Tree:
        if isinstance(condition, bool):
            return super()._if(condition, function, old, *arrays)
        found: T_Tree = jax.lax.cond(condition, function, lambda old, *_: old, old, *arrays)
        return found


class Steps:
    """The core's optimizer on the layers, each a weight with its bias as their leaves have them."""

    def __init__(
        self,
        layers: Layers | None,
        structures: Any,
        recipe: str,
        T: Any,
        preconditioner_dtype: tuple[Any, Any],
        fallback: Fallback | None,
        loss: Callable[..., Any] | None = None,
        momentum_dtype: Any = None,
        **given: Any,
    ) -> None:
        if layers is not None and loss is not None:
            raise TypeError(
                "give singd either loss=loss, for tx.init(params, *batch), or "
                "layers=singd_jax.find_layers(loss)(params, *batch), or gradients alone"
            )
        self.find = None if loss is None else find_layers(loss)
        # The structure of the last state, which optax.tree.map_params asks for without parameters.
        self.known: dict[str, Any] = {}
        schedules = {name: given[name] for name in _RATES if callable(given.get(name))}
        started = {name: _start(name, schedule) for name, schedule in schedules.items()}
        if callable(T):
            raise ValueError(
                f"T={T!r}: must be a number of steps; optax.inject_hyperparams takes a schedule"
            )
        rows = given.get("rows")
        if rows is not None and not isinstance(rows, (int, float)):
            raise ValueError(
                f"rows={rows!r}: must be a number, which shapes depend on; name it in the "
                "static_args of optax.inject_hyperparams"
            )
        # T may be an array (inject_hyperparams makes one), which the core need not know
        counted = T if T is None or isinstance(T, (int, float)) else 1
        self.optimizer = _Optimizer(
            {},
            recipe=recipe,
            structures=pair(structures),
            preconditioner_dtype=preconditioner_dtype,
            momentum_dtype=momentum_dtype,
            fallback=fallback,
            **given | started | {"T": counted},
        )
        self.schedules = schedules
        self.T = self.optimizer.settings.T if T is None or isinstance(T, int) else T
        self.chooses = structures is not None
        self._take(NONE if layers is None else checked(layers))

    def _take(self, layers: Layers) -> None:
        """Train these layers, with the structures that they were found with unless given others."""
        self.layers = layers
        if not self.chooses and layers.structures is not None:
            self.optimizer.structures = layers.structures

    def _of(self, state: SingdState) -> Steps:
        """The same with the layers of a state."""
        own = copy.copy(self)
        own.optimizer = copy.copy(self.optimizer)
        own._take(state.fixed.layers)
        return own

    def init(self, params: Any, *batch: Any, **keywords: Any) -> SingdState:
        """The state before the first step; the batch is wanted where the layers are to be found.

        Raises:
            ValueError: If there is no batch, or naming the first parameter that is not as it was
                when the layers were found.
        """
        return self.start(params, *batch, **keywords)

    def start(self, params: Any, *batch: Any, others: bool = True, **keywords: Any) -> SingdState:
        """As `init`; the moments of other parameters are left out if they are not trained."""
        register_with_flax()
        if type(params).__name__ == "_ParamsPlaceholder":
            return self._placeholder(params)
        if self.find is not None:
            self._take(self._found(params, batch, keywords))
        with jax.numpy_rank_promotion("allow"):
            return self._start(params, others)

    def _found(self, params: Any, batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> Layers:
        """The layers of the loss."""
        try:
            return self.find(params, *batch, **keywords)  # type: ignore[misc]
        except TypeError as error:
            if batch or keywords:
                raise
            raise ValueError(
                "singd(loss=...) finds the layers in tx.init(params, *batch), which got no batch: "
                "as a part of others, or where others call it, give it "
                "layers=singd_jax.find_layers(loss)(params, *batch)"
            ) from error

    def _start(self, params: Any, others: bool) -> SingdState:
        leaves = Leaves.of(params)
        arrays = leaves.named
        needed = [name for name in self.layers.shapes if not leaves.leaves_out(name)]
        self.layers.refuse_others(arrays, needed)
        if self.layers is not NONE:
            self._refuse_further(arrays, self.layers.shapes)
        found, s = self._present(arrays), self.optimizer.settings
        owned = {name for layer in found.values() for name in layer.leaves}
        others_found = tensors(arrays, owned, s) if others else {}
        found |= others_found
        owned |= set(others_found)
        dtypes = {name: arrays[name].dtype for name in owned}

        # Compiled, so that no array is tied to a device: the core makes them on that of another
        # array, and the second step would be compiled again for what is then tied to it.
        def made() -> dict[str, LayerState]:
            return {name: self._layer_state(layer, dtypes) for name, layer in found.items()}

        where = shardings(found, arrays, jax.eval_shape(made))
        states = jax.jit(made, out_shardings=where)()
        rest = {k: _moments(a, s) for k, a in arrays.items() if others and k not in owned}
        count, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        core = State(count, skipped, states, rest)  # type: ignore[arg-type]
        fixed = Fixed(extended(self.layers, others_found), s.growing_T, s.rows)
        state = SingdState.of(core, params, self._T(), fixed)
        self.known |= {"rest": jax.tree.map(lambda _: 0, state.rest), "fixed": fixed}
        return state

    @_compat.any_ranks
    def update(
        self,
        grads: Any,
        state: SingdState,
        params: Any,
        curvature: Mapping[str, Curvature] | None,
    ) -> tuple[Any, SingdState]:
        """The changes of the parameters, and the new state.

        Raises:
            ValueError: If there are no parameters, or they or the gradients do not fit the state.
        """
        return self._of(state)._update(grads, state, params, curvature)

    def _update(
        self,
        grads: Any,
        state: SingdState,
        params: Any,
        curvature: Mapping[str, Curvature] | None,
    ) -> tuple[Any, SingdState]:
        if params is None:
            raise ValueError(
                "singd needs the parameters: tx.update(grads, state, params, curvature=curvature)"
            )
        core = state.core
        needed = [*self._owned(core), *core.fallback]
        gradients, tree = self._arrays(grads, needed, "gradients")
        weights, _ = self._arrays(params, needed, "parameters")
        self._refuse_further(gradients, needed)
        if not needed:  # an empty group
            return grads, self._counted(state, core)
        optimizer, refreshed = self._begun(state, curvature)
        given, old = self._parameters(gradients, core), self._parameters(weights, core)
        refreshed |= self._learned(optimizer, state, given, old)
        new, stepped = optimizer.update(given, core, old, refreshed=refreshed)
        changes = self._leaves(gradients, core, new)
        return tree(changes), self._counted(state, stepped)

    @_compat.any_ranks
    def precondition(
        self,
        grads: Any,
        state: SingdState,
        params: Any,
        curvature: Mapping[str, Curvature] | None,
    ) -> tuple[Any, SingdState]:
        """The natural gradients of the layers, and the new state; `params` may be None.

        Raises:
            ValueError: If the gradients do not fit the state.
        """
        del params
        return self._of(state)._precondition(grads, state, curvature)

    def _precondition(
        self, grads: Any, state: SingdState, curvature: Mapping[str, Curvature] | None
    ) -> tuple[Any, SingdState]:
        core = state.core
        gradients, tree = self._arrays(grads, self._owned(core), "gradients")
        _, refreshed = self._begun(state, curvature)
        new, total = self._parameters(gradients, core, others=True), jnp.zeros(())
        layers, trained = {}, self._trained(core)
        for name, gradient in new.items():
            if name in core.layers:
                kind, own = trained[name].laid, parts(gradient)
                factors = refreshed.get(name, core.layers[name].factors)
                natural = factors.precondition(kind.matrix(*own))
                regions = kind.split(natural, own[0].shape, len(own) > 1)
                new[name] = like(gradient, [part for part in regions if part is not None])
                layers[name] = LayerState(factors, None)
            for g, n in zip(parts(gradient), parts(new[name]), strict=True):
                total = total + jnp.sum(widen(g) * widen(n))
        ok = jnp.isfinite(total)
        kept = State(core.step, core.skipped, layers, {}).map(
            lambda new, old: new if new is old else jnp.where(ok, new, old), core
        )
        skipped = core.skipped + (~ok).astype(core.skipped.dtype)
        changes = self._leaves(gradients, core, new)
        changes = {name: jnp.where(ok, a, jnp.zeros_like(a)) for name, a in changes.items()}
        return tree(changes), self._counted(state, dataclasses.replace(kept, skipped=skipped))

    def _at(self, state: SingdState) -> Optimizer:
        """The optimizer with the rates of this step."""
        core, optimizer = state.core, copy.copy(self.optimizer)
        optimizer.layers = {name: layer.laid for name, layer in self._trained(core).items()}
        rates = {name: schedule(core.step) for name, schedule in self.schedules.items()}
        if state.T is not None:  # maybe an array
            rates["T"] = state.T
        optimizer.settings = dataclasses.replace(optimizer.settings, **rates)
        own = {
            name: value(core.step)
            for name, value in vars(optimizer.fallback).items()
            if callable(value)
        }
        optimizer.fallback = dataclasses.replace(optimizer.fallback, **own)
        return optimizer

    def _begun(
        self, state: SingdState, curvature: Mapping[str, Curvature] | None
    ) -> tuple[Optimizer, dict[str, Factors]]:
        """The optimizer of this step, and the factors of the layers of which there is curvature."""
        optimizer, core = self._at(state), state.core
        given = joined(curvature or {}, self.layers)
        known = {k: c for k, c in given.items() if k in core.layers}
        wanted = [name for name in core.layers if self.layers[name].has_rows]
        if curvature and wanted and not known:
            raise ValueError(
                f"the curvature is that of {', '.join(curvature)}, and the state that of "
                f"{', '.join(wanted)}: give both the same layers"
            )
        if not known or state.T is None:
            return optimizer, optimizer.refresh(core, known)
        refreshed = jax.lax.cond(
            state.due,
            lambda known, old: optimizer.refresh(core, known),
            lambda known, old: old,
            known,
            {name: core.layers[name].factors for name in known},
        )
        return optimizer, refreshed

    def _learned(
        self,
        optimizer: Optimizer,
        state: SingdState,
        gradients: Mapping[str, Parameter],
        weights: Mapping[str, Parameter],
    ) -> dict[str, Factors]:
        """The factors of the leaves that show no rows, refreshed by gradients if that is due."""
        core = state.core
        old = {n: o.factors for n, o in core.layers.items() if not self.layers[n].has_rows}
        if not old:
            return {}

        def refreshed() -> dict[str, Factors]:
            return optimizer.refresh_by_gradients(core, gradients, weights)

        if state.T is None:
            return refreshed()
        learned: dict[str, Factors] = jax.lax.cond(state.due, refreshed, lambda: old)
        return learned

    def _counted(self, state: SingdState, stepped: State) -> SingdState:
        step = state.rest.step + 1  # also where nothing else has changed
        return state.with_core(dataclasses.replace(stepped, step=step))._replace(T=self._T())

    def _T(self) -> Array | None:
        always = isinstance(self.T, int) and self.T == 1
        return None if always else jnp.asarray(self.T, jnp.int32)

    def _placeholder(self, params: Any) -> SingdState:
        """A state of the same structure, with what `optax.tree.map_params` gives for parameters."""
        if "rest" not in self.known:
            shapes = self.layers.shapes.items()
            jax.eval_shape(lambda: self.init({k: jnp.zeros(n) for k, n in shapes}))
        costs = params if self.optimizer.settings.rounding == "kahan" else None
        return SingdState(params, params, self.known["rest"], self._T(), self.known["fixed"], costs)

    def _layer_state(self, layer: Layer, dtypes: Mapping[str, Any]) -> LayerState:
        """The state of a layer, its momenta without entries yet."""
        optimizer = self.optimizer
        structures = layer.structures(optimizer.structures, self._rule())
        empty = [jnp.zeros((0,), dtypes[leaf]) for leaf in layer.leaves]
        likes = [
            ranged(empty[0]) if dtype is None else jnp.zeros((0,), dtype)
            for dtype in optimizer.preconditioner_dtype
        ]
        factors = rules.start(
            structures,
            layer.shape,
            optimizer.settings,
            *likes,
            has_rows=layer.has_rows,
            one_hot=bool(layer.diagonal),
        )
        dtype = optimizer.momentum_dtype
        return begun(factors, empty, layer.shape[0], optimizer.settings, dtype)

    def _rule(self) -> type[rules.Rule]:
        return rules.get(self.optimizer.settings.rule)

    def _present(self, arrays: Mapping[str, Array]) -> dict[str, Layer]:
        """The layers whose weight is there, and their bias if it is: masks leave some out.

        One-hot rows have no dense factors, which some rules want.
        """
        dense = self._rule().only_dense
        return {
            name: layer if layer.leaves[-1] in arrays else layer.without_bias()
            for name, layer in self.layers.items()
            if layer.weight.name in arrays and not (dense and layer.diagonal)
        }

    def _trained(self, core: State) -> dict[str, Layer]:
        """The layers of a state."""
        return {name: self.layers[name].of(own.factors) for name, own in core.layers.items()}

    def _owned(self, core: State) -> list[str]:
        """Their leaves."""
        return [leaf for layer in self._trained(core).values() for leaf in layer.leaves]

    def _arrays(
        self, tree: Any, needed: Sequence[str], what: str
    ) -> tuple[dict[str, Array], Callable[[Mapping[str, Array]], Any]]:
        """The leaves of a pytree by name, and how to put them back."""
        leaves = Leaves.of(tree)
        self.layers.refuse_others(leaves.named, needed, what)
        return leaves.named, lambda new: leaves.join([new[name] for name in leaves.names])

    def _refuse_further(self, arrays: Mapping[str, Array], known: Iterable[str]) -> None:
        """Raise if there is an array that is none of those known.

        Raises:
            ValueError: Naming the first.
        """
        for name in arrays:
            if name not in known and name in self.layers.numbers:
                raise ValueError(
                    f"{name!r} was a Python number when the layers were found, which is not "
                    "trained: make it jnp.asarray(...) there"
                )
            if name not in known:
                raise ValueError(
                    f"{name!r} is none of the parameters that the layers were found with and that "
                    "tx.init was given: do both anew with these parameters"
                )

    def _parameters(
        self, arrays: Mapping[str, Array], core: State, others: bool = False
    ) -> dict[str, Parameter]:
        """The layers as weights with biases, and the other parameters as they are."""
        layers = {name: layer.parameter(arrays) for name, layer in self._trained(core).items()}
        owned = self._owned(core)
        rest = {
            k: a for k, a in arrays.items() if (others or k in core.fallback) and k not in owned
        }
        return layers | rest

    def _leaves(
        self, arrays: Mapping[str, Array], core: State, new: Mapping[str, Parameter]
    ) -> dict[str, Array]:
        """The leaves of what `_parameters` made."""
        found, trained = dict(arrays), self._trained(core)
        for part in (part for layer in trained.values() for part in layer.parts):
            if not part.whole:  # what no layer uses stays as it is
                found[part.name] = jnp.zeros_like(arrays[part.name])
        for name, value in new.items():
            if name in trained:
                found |= trained[name].put(found, value)
            else:
                found[name] = value
        return found


def _start(name: str, schedule: Callable[[Array], Any]) -> Any:
    """What a schedule starts at: a number if it is constant, else an array.

    What the optimizer keeps must not depend on a rate that happens to start at 0.

    Raises:
        TypeError: If it is no function of a number that returns one, as a model is none.
    """
    values: list[Any] = []
    try:
        jax.eval_shape(lambda count: values.append(schedule(count)), jnp.zeros((), jnp.int32))
    except jax.errors.JAXTypeError:  # it reads the count: for steps that are not compiled
        return jnp.zeros(())
    except Exception as error:
        raise TypeError(_no_schedule(name, schedule)) from error
    # a count that nobody can read does not decide about a number
    if isinstance(values[0], (int, float)):
        return values[0]
    if getattr(values[0], "ndim", None) != 0:
        raise TypeError(_no_schedule(name, schedule))
    return jnp.zeros(())


def _no_schedule(name: str, given: Any) -> str:
    name = "learning_rate" if name == "lr" else name
    return (
        f"{name} must be a number or a schedule, a function of the number of steps, and this "
        f"{type(given).__name__} is neither"
    )


def _moments(a: Array, s: Settings) -> Moments:
    """Zeros, sharded like the parameter; their count is on no device in particular."""
    wide = jnp.abs(jnp.zeros_like(widen(a)))  # real
    return Moments(jnp.zeros_like(a), wide, jnp.zeros((), wide.dtype), no_cost(a, s))
