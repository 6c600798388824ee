"""The pure optimizer over named layers: what runs on NumPy, CuPy or any other arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from singd_core import preconditioner
from singd_core._array import Array, device, expand, full, namespace, ranged, total, widen
from singd_core._tree import Tree, tree
from singd_core.curvature import LayerKind, Linear
from singd_core.curvature.base import is_expand, loss_terms
from singd_core.settings import STRUCTURES, rate, settings
from singd_core.structures import Diagonal
from singd_core.updates.adamw import Fallback, Moments
from singd_core.updates.curvature import Curvature
from singd_core.updates.inverse_free import InverseFree
from singd_core.updates.weights import (
    couples_decay,
    direction,
    inner,
    kl_scale,
    rms_scale,
    weight_change,
)

Parameter: TypeAlias = Array | tuple[Array, Array]  # a weight, or a weight with its bias
Rows: TypeAlias = tuple[Array, Array]  # a layer's input, and the loss's gradient at its output


@tree
class LayerState(Tree):
    """The state of one layer.

    Attributes:
        factors: Its preconditioner.
        momentum_buffer: The momentum of its weight matrix, bias included, or None.
    """

    factors: preconditioner.Factors
    momentum_buffer: Array | None


@tree
class State(Tree):
    """The state of the optimizer: arrays and one number.

    Attributes:
        step: Number of steps taken.
        skipped: How many of them changed nothing, since a gradient or row was not finite; 0-d.
        layers: The state of each layer.
        fallback: The moments of each parameter that belongs to no layer.
    """

    step: int
    skipped: Array
    layers: dict[str, LayerState]
    fallback: dict[str, Moments]


class Optimizer:
    """SINGD as a pair of pure functions, `init` and `update`, over a dictionary of parameters.

    A parameter is an array, or a tuple of a weight and its bias. Those named in `layers` are
    preconditioned; all others are trained by AdamW.

    Args:
        layers: The kind of each layer; None takes each tuple and each matrix as `Linear()`.
        recipe: "robust" or "paper": the settings not given. See `singd_core.settings.Settings`.
        structures: Of K and of C, by name or class; None is dense for the recipe "paper", and
            else the richest that hold no more numbers than the weight.
        kfac_approx: "expand" or "reduce": how positions that share the weight are treated.
        loss_average: What the loss is a mean of: "batch", "batch+sequence", or None for a sum.
        preconditioner_dtype: Of K and of C; None is the weight's, float32 for float16.
        fallback: Settings of AdamW.
        **given: Settings that win over the recipe, e.g. `lr=0.01` or `T=10`.

    Raises:
        ValueError: If a setting is out of range or a name unknown.

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
        recipe: str = "robust",
        structures: preconditioner.Structures | str | None = None,
        kfac_approx: str = "expand",
        loss_average: str | None = "batch",
        preconditioner_dtype: tuple[Any, Any] = (None, None),
        fallback: Fallback | None = None,
        **given: Any,
    ) -> None:
        self.settings = settings(recipe, **given)
        self.layers = None if layers is None else dict(layers)
        preconditioner.resolve(structures, kfac=self.settings.kfac)
        self.structures = STRUCTURES[recipe] if structures is None else structures
        is_expand(kfac_approx)  # both are checked here, before any rows come
        loss_terms(loss_average, 1, ())
        self.kfac_approx, self.loss_average = kfac_approx, loss_average
        self.preconditioner_dtype = preconditioner_dtype
        self.fallback = fallback or Fallback()

    def init(self, params: Mapping[str, Parameter]) -> State:
        """The state before the first step.

        Raises:
            ValueError: If there is no parameter, or a layer is named that is none of them.
        """
        if not params:
            raise ValueError("params is empty: there is nothing to train")
        kinds, s = self._kinds(params), self.settings
        layers, fallback = {}, {}
        for name, parameter in params.items():
            if name in kinds:
                weight, bias = _pair(parameter)
                shape = kinds[name].shape(tuple(weight.shape), bias is not None)
                likes = [_empty(weight, dtype) for dtype in self.preconditioner_dtype]
                K, C = preconditioner.resolve(self.structures, shape, kfac=s.kfac)
                K = Diagonal if kinds[name].diagonal_inputs else K
                factors = preconditioner.init((K, C), shape, s, *likes)
                momentum = (
                    None
                    if isinstance(s.momentum, (int, float)) and s.momentum == 0.0
                    else full((*shape[0], *shape[1:]), 0.0, like=ranged(weight))
                )
                layers[name] = LayerState(factors, momentum)
            elif isinstance(parameter, tuple):
                raise ValueError(f"{name!r} has a bias but is no layer: name it in layers=")
            else:
                fallback[name] = Moments.zeros(parameter)
        weight = _pair(next(iter(params.values())))[0]
        skipped = namespace(weight).zeros((), dtype=namespace(weight).int32, device=device(weight))
        return State(0, skipped, layers, fallback)

    def due(self, state: State) -> bool:
        """Whether the next `update` wants rows, which is every T steps."""
        return state.step % self.settings.T == 0

    def curvature(
        self, rows: Mapping[str, Rows], state: State, params: Mapping[str, Parameter]
    ) -> dict[str, Curvature]:
        """The curvature of the layers whose rows are given.

        Args:
            rows: For each layer its input, shape (batch, ..., d_in), and the loss's gradient at
                its output, shape (batch, ..., d_out); for a convolution images of both.
            state: The current state.
            params: The current parameters.

        Raises:
            ValueError: If a name is no layer, or rows do not fit it.
        """
        kinds, found = self._kinds(params), {}
        for name, (x, g) in rows.items():
            if name not in state.layers:
                raise ValueError(f"rows of {name!r}: no such layer; there are {list(state.layers)}")
            kind, factors, how = kinds[name], state.layers[name].factors, self.kfac_approx
            bias = _pair(params[name])[1] is not None
            inputs_of = kind.diagonal_rows if _has_diagonal_K(factors) else kind.inputs
            A, N = inputs_of(x, bias=bias, kfac_approx=how)
            B, M = kind.outputs(g, kfac_approx=how, loss_average=self.loss_average)
            _, d_out, d_in = kind.shape(_pair(params[name])[0].shape, bias)
            if (A.shape[-1], B.shape[-1]) != (d_in, d_out) or B.shape[-2] != N:
                raise ValueError(
                    f"rows of {name!r}: {N} of length {A.shape[-1]} and {B.shape[-2]} of length "
                    f"{B.shape[-1]} do not fit a {d_out} × {d_in} matrix and each other"
                )
            inputs, outputs = factors.measure(A, B)
            found[name] = Curvature.of(inputs, N, outputs, M)
        return found

    def refresh(
        self, state: State, curvature: Mapping[str, Curvature]
    ) -> dict[str, preconditioner.Factors]:
        """The factors of the layers whose curvature is given, one refresh later."""
        lr_cov = rate(self.settings.lr_cov, state.step)
        return {
            name: state.layers[name].factors.refresh(measured, lr_cov, self.settings)
            for name, measured in curvature.items()
        }

    def update(
        self,
        grads: Mapping[str, Parameter],
        state: State,
        params: Mapping[str, Parameter],
        rows: Mapping[str, Rows] | None = None,
        *,
        curvature: Mapping[str, Curvature] | None = None,
        refreshed: Mapping[str, preconditioner.Factors] | None = None,
    ) -> tuple[dict[str, Parameter], State]:
        """The changes of the parameters, and the new state.

        Args:
            grads: The gradients, structured like `params`.
            state: The current state.
            params: The current parameters.
            rows: What `curvature` takes, when `due(state)`; layers without keep their factors.
            curvature: In place of rows, the curvature itself.
            refreshed: In place of both, what `refresh` returned.

        Returns:
            The changes, to be added (`apply` does), and the new state. If anything among gradients
            and rows is not finite, the changes are zero and all but the counts stays as it was.

        Raises:
            ValueError: If names or shapes do not fit.
        """
        s = self.settings
        _check_alike(grads, params)
        kinds = self._kinds(params)
        if curvature is None:
            curvature = {} if rows is None else self.curvature(rows, state, params)
        refreshed = self.refresh(state, curvature) if refreshed is None else refreshed
        factors, naturals, scales, energies = {}, {}, {}, []
        for name, layer in state.layers.items():
            factors[name] = refreshed.get(name, layer.factors)
            gradient = kinds[name].matrix(*_pair(grads[name]))
            naturals[name] = natural = factors[name].precondition(gradient)
            scales[name] = rms_scale(natural, s.rms_bound)
            energies.append(total(scales[name] * inner(gradient, natural)))
        kl = kl_scale(s.lr**2 * sum(energies), s.kl_bound) if energies else 1.0

        updates: dict[str, Parameter] = {}
        layers, fallback = {}, {}
        for name, layer in state.layers.items():
            kind, (weight, bias) = kinds[name], _pair(params[name])
            matrix = kind.matrix(weight, bias)
            decay = matrix * expand(s.weight_decay, matrix) if couples_decay(s) else None
            scale = scales[name] * kl
            u, momentum = direction(naturals[name], decay, layer.momentum_buffer, scale, s)
            change = weight_change(u, matrix, s)
            parts = kind.split(change, tuple(weight.shape), bias is not None)
            updates[name] = parts if isinstance(params[name], tuple) else parts[0]
            layers[name] = LayerState(factors[name], momentum)
        for name, moments in state.fallback.items():
            updates[name], fallback[name] = moments.update(grads[name], params[name], self.fallback)
            energies.append(total(widen(grads[name]) ** 2))

        xp, ok = namespace(state.skipped), namespace(state.skipped).isfinite(sum(energies))
        stepped = State(state.step + 1, state.skipped, layers, fallback)
        kept = stepped.map(lambda new, old: new if new is old else xp.where(ok, new, old), state)
        skipped = state.skipped + xp.astype(~ok, state.skipped.dtype)
        for name, change in updates.items():
            masked = [xp.where(ok, u, xp.zeros_like(u)) for u in _parts(change)]
            updates[name] = tuple(masked) if isinstance(change, tuple) else masked[0]
        return updates, dataclasses.replace(kept, step=stepped.step, skipped=skipped)

    def apply(
        self, params: Mapping[str, Parameter], updates: Mapping[str, Parameter]
    ) -> dict[str, Parameter]:
        """The parameters with their changes added."""
        return {
            name: tuple(p + u for p, u in zip(value, updates[name], strict=True))
            if isinstance(value, tuple)
            else value + updates[name]
            for name, value in params.items()
        }

    def _kinds(self, params: Mapping[str, Parameter]) -> dict[str, LayerKind]:
        if self.layers is None:
            return {n: Linear() for n, p in params.items() if isinstance(p, tuple) or p.ndim == 2}
        for name in self.layers:
            if name not in params:
                raise ValueError(f"layers: {name!r} is no parameter; there are {list(params)}")
        return self.layers


def _has_diagonal_K(factors: preconditioner.Factors) -> bool:
    return isinstance(factors, InverseFree) and isinstance(factors.K, Diagonal)


def _pair(parameter: Parameter) -> tuple[Array, Array | None]:
    return parameter if isinstance(parameter, tuple) else (parameter, None)


def _parts(parameter: Parameter) -> tuple[Array, ...]:
    return parameter if isinstance(parameter, tuple) else (parameter,)


def _check_alike(grads: Mapping[str, Parameter], params: Mapping[str, Parameter]) -> None:
    if grads.keys() != params.keys():
        odd = sorted(set(grads) ^ set(params))
        raise ValueError(
            f"gradients and parameters have different names: {odd} in only one of them"
        )
    for name, parameter in params.items():
        got, expected = _shapes(grads[name]), _shapes(parameter)
        if got != expected:
            raise ValueError(f"the gradient of {name!r} has shape {got}, its parameter {expected}")


def _shapes(parameter: Parameter) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in _parts(parameter)]


def _empty(like: Array, dtype: Any) -> Array:
    """An empty array on the device of `like`, in `dtype` or else one that holds its factors."""
    xp = namespace(like)
    return (
        ranged(like[..., :0]) if dtype is None else xp.empty((0,), dtype=dtype, device=device(like))
    )
