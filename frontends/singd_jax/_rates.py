"""The settings of a step: rates that may be schedules, and conditions that stay in the program."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core import _parameter, rules
from singd_core._array import Array
from singd_core._given import kinds_of
from singd_core._layer_state import Parameter, State
from singd_core._settings import RATES, Settings, plain
from singd_core._tree import T_Tree
from singd_core.adamw import Fallback
from singd_core.layers import LayerKind
from singd_core.optimizer import Optimizer
from singd_jax import _compat
from singd_jax._layer import Layer
from singd_jax._layers import pair
from singd_jax._shared import Shared
from singd_jax._state import SingdState

Rate: TypeAlias = Any  # a number, a 0-d array, or a schedule: a function of the number of steps

# The core takes a function for `lr_cov` by itself.
_RATES = [name for name in RATES if name != "lr_cov"]


class Stepper(Optimizer):
    """The core's optimizer, whose conditions stay in the program, and whose layers share code.

    Attributes:
        shared: Runs what equal layers have in common.
        step: The number of steps taken.
        matrices: The number of weight matrices.
    """

    shared: Shared
    step: Array
    matrices: int

    def _if(
        self, condition: Any, function: Callable[..., T_Tree], old: T_Tree, *arrays: Array
    ) -> T_Tree:
        if not _compat.is_traced(condition):
            return super()._if(bool(condition), function, old, *arrays)

        def branch(old: T_Tree, *arrays: Array) -> T_Tree:
            found: T_Tree = jax.lax.cond(condition, function, lambda old, *_: old, old, *arrays)
            return found

        # on a GPU the host waits for each condition, and every layer has one
        always = functools.partial(super()._if, condition, function)
        found: T_Tree = jax.lax.platform_dependent(
            old, *arrays, cuda=always, rocm=always, default=branch
        )
        return found

    def _run(
        self, function: Callable[..., Any], owner: Any, *arguments: Any, like: Any = None
    ) -> Any:
        found = self.shared(function, *arguments)
        # all that changes depends on it
        return _compat.kept(found, self.step) if function is _parameter.all_finite else found

    def _matrices(self, state: State) -> int:
        return self.matrices

    def _kinds(self, params: Mapping[str, Parameter]) -> Mapping[str, LayerKind]:
        return kinds_of(self.layers, params)  # the state tells which of the others are matrices

    def _chosen(self, *_: Any) -> None:
        """Layers may have been found with structures of their own."""


class Rates:
    """The settings of all steps.

    Attributes:
        optimizer: The core's optimizer with what the schedules start at.
        schedules: The rates that are functions of the number of steps.
        T: Steps between two refreshes, a number or an array.
    """

    def __init__(
        self,
        recipe: str,
        structures: Any,
        T: Any,
        preconditioner_dtype: tuple[Any, Any],
        fallback: Fallback | None,
        momentum_dtype: Any = None,
        **given: Any,
    ) -> None:
        self.schedules = {name: given[name] for name in _RATES if callable(given.get(name))}
        started = {name: _start(name, schedule) for name, schedule in self.schedules.items()}
        if callable(T):
            raise ValueError(
                f"T={T!r}: must be a number of steps; optax.inject_hyperparams takes a schedule"
            )
        given, T = {name: plain(value) for name, value in given.items()}, plain(T)
        rows = given.get("rows")
        if rows is not None and not isinstance(rows, (int, float)):
            raise ValueError(
                f"rows={rows!r}: must be a number, which shapes depend on; name it in the "
                "static_args of optax.inject_hyperparams"
            )
        # T may be an array (inject_hyperparams makes one), which the core need not know
        counted = T if T is None or isinstance(T, (int, float)) else 1
        self.optimizer = Stepper(
            {},
            recipe=recipe,
            structures=pair(structures),
            preconditioner_dtype=preconditioner_dtype,
            momentum_dtype=momentum_dtype,
            fallback=fallback,
            **given | started | {"T": counted},
        )
        self._T = self.optimizer.settings.T if T is None or isinstance(T, int) else T

    @property
    def settings(self) -> Settings:
        """The settings, with what the schedules start at."""
        return self.optimizer.settings

    @property
    def rule(self) -> type[rules.Rule]:
        """How the factors learn."""
        return rules.get(self.settings.rule)

    @property
    def T(self) -> Array | None:
        """Steps between two refreshes of the factors, or None if it is every step."""
        always = isinstance(self._T, int) and self._T == 1
        return None if always else jnp.array(self._T, jnp.int32)  # a copy, which may be donated

    def at(self, state: SingdState, layers: Mapping[str, Layer]) -> Stepper:
        """The optimizer of layers with the rates of this step."""
        step, optimizer = state.rest.step, copy.copy(self.optimizer)
        optimizer.shared, optimizer.step = Shared(), step
        optimizer.layers = {name: layer.laid for name, layer in layers.items()}
        weights = {layer.weight.matrix_of: layer.in_turn for layer in layers.values()}
        optimizer.matrices = sum(weights.values())
        rates = {name: schedule(step) for name, schedule in self.schedules.items()}
        if state.T is not None:  # maybe an array
            rates["T"] = state.T
        optimizer.settings = dataclasses.replace(optimizer.settings, **rates)
        own = {
            name: value(step) for name, value in vars(optimizer.fallback).items() if callable(value)
        }
        optimizer.fallback = dataclasses.replace(optimizer.fallback, **own)
        return optimizer


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
