"""The pure optimizer over named layers. It runs on NumPy, CuPy or any other arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from singd_core import _given, _parameter, rules
from singd_core._array import Array, cast
from singd_core._given_rows import check_made, rows_of
from singd_core._given_state import check_state
from singd_core._layer_state import (
    Parameter,
    State,
    begun_moments,
    chosen_structures,
    dtypes_of,
    layer_state,
)
from singd_core._parameter import new_or_old
from singd_core._recipes import DEFAULT, STRUCTURES, fallback_of, settings, small_step
from singd_core._settings import arrays_of, is_due, rate_of_factors
from singd_core._tree import T_Tree, each
from singd_core._warnings import warn
from singd_core.adamw import Fallback
from singd_core.curvature import Curvature
from singd_core.layers import LayerKind
from singd_core.levels import leveled
from singd_core.rounding import Rounding
from singd_core.step import largest_rate, next_step, of_step
from singd_core.structures import Structure, choose

Rows: TypeAlias = tuple[Array, Array]  # a layer's input, and the loss's gradient at its output


class Optimizer:
    """SINGD as a pair of pure functions, `init` and `update`, over a dictionary of parameters.

    A parameter is an array, or a tuple of a weight and its bias. Rows refresh the factors of the
    parameters that `layers` names. Gradients refresh the factors of other parameters of two or more
    axes; with the recipe "paper" these have no factors. AdamW trains the rest.

    Args:
        layers: The kind of each layer. None takes each tuple and each matrix as `Linear()`. With {}
            no parameter is a layer, and gradients are all that `update` needs.
        recipe: "normalized" or "paper": the values of all settings that are not given. See
            `singd_core.Settings`.
        structures: Of K and of C, or one for both, by name or class. None is dense for the recipe
            "paper". Otherwise None is "cost:512": the richest that cost little beside a step with
            512 rows and hold no more numbers than the weight (docs/mathematics.md, section 5).
        kfac_approx: "expand" or "reduce": how positions that share the weight are treated.
        loss_average: What the loss is a mean of: "batch", "batch+sequence", a number of terms, or
            None for a sum (M of equation 1.1).
        preconditioner_dtype: Dtypes of K and of C. None is the weight's, and float32 for float16.
        momentum_dtype: Dtype of layers' momenta. None is the weight's, and float32 for float16.
        fallback: Settings of AdamW, see `Fallback`.
        **given: Settings that win over the recipe, e.g. `lr=0.01` or `T=10`.

    Raises:
        TypeError: If a layer has no kind, or `fallback` is no `Fallback`.
        ValueError: If a setting is out of range or a name is unknown.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((64, 3)), rng.standard_normal((64, 2))
        >>> params = {"map": (np.zeros((2, 3)), np.zeros(2))}
        >>> optimizer = Optimizer(lr=0.1)
        >>> state = optimizer.init(params)
        >>> for _ in range(3):
        ...     W, b = params["map"]
        ...     g = (x @ W.T + b - y) / len(x)  # gradient of the mean of ½‖z − y‖²
        ...     grads = {"map": (g.T @ x, g.sum(0))}
        ...     updates, state = optimizer.update(grads, state, params, {"map": (x, g)})
        ...     params = optimizer.apply(params, updates)
    """

    def __init__(
        self,
        layers: Mapping[str, LayerKind] | None = None,
        *,
        recipe: str = DEFAULT,
        structures: choose.Structures | None = None,
        kfac_approx: str = "expand",
        loss_average: str | int | None = "batch",
        preconditioner_dtype: tuple[Any, Any] = (None, None),
        momentum_dtype: Any = None,
        fallback: Fallback | None = None,
        **given: Any,
    ) -> None:
        self.settings = settings(recipe, **given)
        _given.check_layers(layers)
        self.layers = None if layers is None else dict(layers)
        rules.get(self.settings.rule).choose(structures)
        self.structures = STRUCTURES[recipe] if structures is None else structures
        self.kfac_approx, self.loss_average = kfac_approx, loss_average
        self.preconditioner_dtype, self.momentum_dtype = preconditioner_dtype, momentum_dtype
        self._of_recipe = recipe, given.get("weight_decay")
        self.fallback = fallback
        _given.check_options(kfac_approx, loss_average, preconditioner_dtype)
        if self.settings.normalized and (small := small_step([self.settings.lr])):
            warn(small)

    @property
    def fallback(self) -> Fallback:
        """The settings of AdamW. What another `Fallback` leaves out has the recipe's value."""
        return self._fallback

    @fallback.setter
    def fallback(self, given: Fallback | None) -> None:
        self._fallback = fallback_of(*self._of_recipe, given)

    def init(self, params: Mapping[str, Parameter]) -> State:
        """The state before the first step.

        Raises:
            TypeError: If `params` is no dictionary of arrays and tuples.
            ValueError: If there is no parameter, a parameter has integers, a named layer is no
                parameter, a weight and its bias do not fit the kind of their layer, or two names
                have the same text.
        """
        _given.check_named(params)
        kinds, first = self._kinds(params), next(iter(params.values()))
        given = self.structures, self.preconditioner_dtype, self.momentum_dtype, self.settings
        layers, fallback = {}, {}
        _given.check_params(params, kinds)
        for name, parameter in params.items():
            if name in kinds:
                start = partial(layer_state, kinds[name], parameter, *given)
                layers[name] = self._run(start, parameter)
            else:
                begin = partial(begun_moments, parameter, self.settings)
                fallback[name] = self._run(begin, parameter)
        skipped = self._run(partial(_parameter.count_state, first), first)
        return State(0, 0.0, skipped, layers, fallback)

    def due(self, state: State) -> bool:
        """Whether the next `update` refreshes the factors, and so needs rows.

        Raises:
            TypeError: If `state` is no state.
        """
        return bool(is_due(_given.a_state(state).step, self.settings))

    def curvature(
        self, rows: Mapping[str, Rows], state: State, params: Mapping[str, Parameter]
    ) -> dict[str, Curvature]:
        """The curvature of the layers whose rows are given.

        Args:
            rows: For each layer its input, shape (batch, ..., d_in), and the gradient of the loss
                at its output, shape (batch, ..., d_out). For a convolution both are images.
            state: The current state.
            params: The current parameters.

        Raises:
            TypeError: If rows are no pair of arrays of the parameters' library.
            ValueError: If a name is no layer, or rows do not fit their layer.
        """
        kinds, found = self._kinds(params), {}
        how = self.kfac_approx, self.loss_average, self.settings.rows, _given.a_state(state).step
        for name, x, g in rows_of(rows, kinds, params, state):
            measure = partial(_parameter.layer_curvature, kinds[name], params[name], *how)
            try:
                found[name] = self._run(measure, params[name], state.layers[name].factors, x, g)
            except ValueError as error:
                raise ValueError(f"rows of {name!r}: {error}") from None
        return found

    def refresh(self, state: State, curvature: Mapping[str, Curvature]) -> dict[str, rules.Factors]:
        """The factors of the layers whose curvature is given, one refresh later.

        Raises:
            TypeError: If `state` is no state, or a curvature none that `curvature` returned.
            ValueError: If a name is no layer.
        """
        check_made("curvature", curvature, "curvature", Curvature, _given.a_state(state))
        refresh = partial(_parameter.refreshed, rate_of_factors(state.step, self.settings))
        return {n: self._refreshed(state, n, refresh, own) for n, own in curvature.items()}

    def refresh_by_gradients(
        self, state: State, grads: Mapping[str, Parameter], params: Mapping[str, Parameter]
    ) -> dict[str, rules.Factors]:
        """The factors of the parameters that show no rows, one refresh later.

        Raises:
            TypeError: If `state` is no state, or a gradient neither an array nor a tuple of two.
            ValueError: If gradients are not structured like the parameters.
        """
        _given.check_update(grads, state, params)
        lr_cov, kinds, new = rate_of_factors(state.step, self.settings), self._kinds(params), {}
        for name, layer in state.layers.items():
            if not layer.factors.has_rows:
                refresh = partial(_parameter.refreshed_by_gradient, kinds[name], lr_cov)
                new[name] = self._refreshed(state, name, refresh, grads[name])
        return new

    def _refreshed(
        self, state: State, name: str, refresh: Callable[..., rules.Factors], given: Any
    ) -> rules.Factors:
        """The factors of a layer after `refresh(settings, rounding, factors, given)`."""
        old = state.layers[name].factors
        how = partial(refresh, self.settings, self._rounding(state, name, old.dtypes))
        found: rules.Factors = self._run(how, old, old, given, like=old)
        return found

    def _learned(
        self, state: State, grads: Mapping[str, Parameter], params: Mapping[str, Parameter]
    ) -> dict[str, rules.Factors]:
        """What `refresh_by_gradients` returns, if this step refreshes factors."""
        due = is_due(state.step, self.settings)
        if due is False:  # it may be an array
            return {}
        learned = self.refresh_by_gradients(state, grads, params)
        return {n: new_or_old(due, new, state.layers[n].factors) for n, new in learned.items()}

    def update(
        self,
        grads: Mapping[str, Parameter],
        state: State,
        params: Mapping[str, Parameter],
        rows: Mapping[str, Rows] | None = None,
        *,
        curvature: Mapping[str, Curvature] | None = None,
        refreshed: Mapping[str, rules.Factors] | None = None,
    ) -> tuple[dict[str, Parameter], State]:
        """The changes of the parameters, and the new state.

        Args:
            grads: The gradients, structured like `params`.
            state: The current state.
            params: The current parameters.
            rows: As `curvature` takes them, if `due(state)` or more often. Others keep factors.
            curvature: Instead of rows, the result of `curvature`.
            refreshed: Instead of both, all that is refreshed: the results of `refresh`, and of
                `refresh_by_gradients` if `due(state)`.

        Returns:
            The changes, and the new state. `apply` adds the changes. If a gradient, a row or a rate
            is not finite, or a rate is negative, the changes are zero, and the state keeps
            everything but its counts.

        Raises:
            TypeError: If something is no array, or comes from another library than its parameter.
            ValueError: If names, shapes, dtypes or the state do not fit.
        """
        _given.check_update(grads, state, params, rows, curvature, refreshed)
        kinds, first = self._kinds(params), next(iter(params.values()))
        given = self.settings, curvature or (), refreshed or {}, self._chosen
        check_state(state, params, kinds, *given)
        largest_lr = largest_rate(state.largest_lr, self.settings.lr)
        s = of_step(self.settings, state.step, largest_lr, self._matrices(state))
        others = dataclasses.replace(self.fallback, lr=self.fallback.lr * s.warm)
        if curvature is None:
            curvature = {} if rows is None else self.curvature(rows, state, params)
        if refreshed is None:
            refreshed = self.refresh(state, curvature) | self._learned(state, grads, params)
        factors = {n: refreshed.get(n, layer.factors) for n, layer in state.layers.items()}
        squares, sizes = {}, []
        for name in state.layers:
            measure = partial(_parameter.layer_squares, kinds[name])
            squares[name], size = self._run(measure, params[name], factors[name], grads[name])
            sizes.append(size)
        for name in state.fallback:
            sizes.append(self._run(_parameter.squares, params[name], grads[name]))
        following = next_step(state.step)
        rate = rate_of_factors(following, s) if s.normalized else 0.0
        rates = arrays_of(s, others)
        if callable(s.lr_cov):  # on a device
            own = rate_of_factors(state.step, s), rate
            rates += [x for x in own if not isinstance(x, (int, float))]
        ok = self._run(_parameter.all_finite, first, sizes, rates)

        level = partial(self._if, is_due(following, s), partial(leveled, lr_cov=rate))
        updates: dict[str, Parameter] = {}
        layers, fallback, moved = {}, {}, [ok]
        for name, layer in state.layers.items():
            p, new = params[name], factors[name]
            rounding = self._rounding(state, name, dtypes_of(p))
            change = partial(_parameter.layer_change, kinds[name], s, level, rounding)
            arguments = p, grads[name], squares[name], layer, new, ok
            found = self._run(change, p, *arguments, like=(p, layer, ok))
            updates[name], layers[name], finite = found
            moved.append(finite)
        for name, moments in state.fallback.items():
            p, g = params[name], grads[name]
            rounding = self._rounding(state, name, dtypes_of(p))
            adamw = partial(_parameter.other_change, others, rounding)
            found = self._run(adamw, p, moments, g, p, ok, like=(p, moments))
            updates[name], fallback[name] = found
        skipped = self._run(_parameter.count_failed, first, state.skipped, moved)
        return updates, State(following, largest_lr, skipped, layers, fallback)

    def apply(
        self, params: Mapping[str, Parameter], updates: Mapping[str, Parameter]
    ) -> dict[str, Parameter]:
        """The parameters plus their changes; a ValueError if these are of other parameters."""
        _given.check_alike(updates, params, "changes", "the change of ")
        return {n: self._run(_parameter.added, p, p, updates[n], like=p) for n, p in params.items()}

    def _run(
        self, function: Callable[..., Any], owner: Any, *arguments: Any, like: Any = None
    ) -> Any:
        """`function(*arguments)`, which concerns one parameter.

        A frontend may override it, to say on which device and in which dtype to compute.

        Args:
            function: The function, holding all that is no array.
            owner: The parameter, or its state: on its device it runs.
            *arguments: Arrays, trees, tuples or lists of them, or None.
            like: Structured like the result: its arrays have the dtypes to keep the result in.
        """
        # bfloat16 on NumPy is promoted by Python numbers
        found = function(*arguments)
        return found if like is None else each(cast, found, like)

    def _if(
        self, condition: Any, function: Callable[..., T_Tree], old: T_Tree, *arrays: Array
    ) -> T_Tree:
        """`function(old, *arrays)` if the condition holds, else `old`.

        A frontend may override it, to save the work where an array has the condition.
        """
        if isinstance(condition, bool):
            return function(old, *arrays) if condition else old
        return new_or_old(condition, function(old, *arrays), old)

    def _chosen(
        self, kind: LayerKind, parameter: Parameter
    ) -> tuple[type[Structure], type[Structure]] | None:
        """What `init` would make K and C; a frontend that chooses by other means may say None."""
        return chosen_structures(kind, parameter, self.structures, self.settings)

    def _matrices(self, state: State) -> int:
        """The number of weight matrices: of the parameters that have factors.

        A frontend may override it, where a parameter has several matrices in turn.
        """
        return len(state.layers)

    def _rounding(self, state: State, name: str, dtypes: Mapping[str, Any]) -> Rounding | None:
        """How the arrays of a parameter are stored after this step."""
        s = self.settings
        return Rounding.of(s.rounding, s.seed, state.step, str(name), dtypes)

    def _kinds(self, params: Mapping[str, Parameter]) -> Mapping[str, LayerKind]:
        """The kinds of all parameters that have factors."""
        layers = _given.kinds_of(self.layers, params)
        if not rules.learns_from_gradients(self.settings):
            return layers
        return dict(layers) | _given.tensors_of(layers, params)
