"""What the state holds of one parameter, before the first step and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import Any, Self, TypeAlias

from singd_core import rules
from singd_core._array import (
    Array,
    device,
    is_complex,
    is_half,
    is_inexact,
    namespace,
    ranged,
)
from singd_core._settings import Settings
from singd_core._tree import Tree, tree
from singd_core.adamw import Moments
from singd_core.late import Late
from singd_core.layers import LayerKind
from singd_core.layers.base import Shape
from singd_core.step import has_momentum
from singd_core.structures import Structure

_SCALARS = "factors.averages.", "late."

NAMES = "weight", "bias"  # the arrays of a parameter, as rounding calls them

Parameter: TypeAlias = Array | tuple[Array, Array]  # a weight, or a weight with its bias


@tree
class LayerState(Tree):
    """The state of one layer.

    Attributes:
        factors: Its preconditioner.
        momentum_buffer: The momentum of its weight, shaped like it, or None.
        bias_momentum_buffer: The momentum of its bias, or None.
        late: Sums over late gradients, or None.
        compensation: What rounding has cost its weight, or None unless that is kept.
        bias_compensation: What it has cost its bias, or None.
    """

    factors: rules.Factors
    momentum_buffer: Array | None
    bias_momentum_buffer: Array | None = None
    late: Late | None = None
    compensation: Array | None = None
    bias_compensation: Array | None = None

    @classmethod
    def of(
        cls,
        factors: rules.Factors,
        momenta: Sequence[Array] | None,
        late: Late | None,
        compensations: Sequence[Array | None] = (),
    ) -> Self:
        """With what is kept of the weight and, if there is one, of the bias."""
        (m, m_bias), (cost, bias_cost) = (
            (*(each or ()), None, None)[:2] for each in (momenta, compensations)
        )
        return cls(factors, m, m_bias, late, cost, bias_cost)

    @property
    def momenta(self) -> list[Array] | None:
        """The momenta of the weight and, if there is one, of the bias."""
        if self.momentum_buffer is None:
            return None
        both = self.momentum_buffer, self.bias_momentum_buffer
        return [m for m in both if m is not None]

    @property
    def compensations(self) -> tuple[Array | None, Array | None]:
        """What rounding has cost the weight and the bias, None where that is not kept."""
        return self.compensation, self.bias_compensation


@tree
class State(Tree):
    """The state of the optimizer: arrays and two numbers.

    Attributes:
        step: Number of steps taken.
        largest_lr: The largest rate of these steps, before any warm-up.
        skipped: How many steps changed nothing, because a gradient, row or rate was not finite, or
            a rate negative; 0-d. Also steps in which a matrix of KFAC had no inverse: they leave
            its layer as it was.
        layers: The state of each layer.
        fallback: The moments of each parameter that belongs to no layer.
    """

    step: int
    largest_lr: float
    skipped: Array
    layers: dict[str, LayerState]
    fallback: dict[str, Moments]


def pair(parameter: Parameter) -> tuple[Array, Array | None]:
    """The weight and its bias, or None."""
    return parameter if isinstance(parameter, tuple) else (parameter, None)


def parts(parameter: Parameter) -> tuple[Array, ...]:
    """The one or two arrays of a parameter."""
    return parameter if isinstance(parameter, tuple) else (parameter,)


def like(parameter: Parameter, arrays: Sequence[Array]) -> Parameter:
    """The inverse of `parts`."""
    return tuple(arrays) if isinstance(parameter, tuple) else arrays[0]


def dtypes_of(parameter: Parameter) -> dict[str, Any]:
    """The dtypes of the weight and, if there is one, of the bias."""
    return {name: a.dtype for name, a in zip(NAMES, parts(parameter), strict=False)}


def layer_state(
    kind: LayerKind,
    parameter: Parameter,
    structures: Any,
    dtypes: Sequence[Any],
    momentum_dtype: Any,
    s: Settings,
) -> LayerState:
    """The state before the first step.

    `dtypes` are the dtypes of K and of C. None is the dtype of the weight, float32 for float16.

    Raises:
        ValueError: If a rule whose factors are dense is asked for a table of embeddings.
    """
    rule = rules.get(s.rule)
    if rule.only_dense and kind.diagonal_inputs:
        raise ValueError(
            f"{rule.title} takes dense factors alone, and {kind} has none: leave it out of layers"
        )
    weight, bias = pair(parameter)
    shape = kind.shape(tuple(weight.shape), bias is not None)
    chosen = chosen_structures(kind, parameter, structures, s)
    likes = [_empty(weight, dtype) for dtype in dtypes]
    how = {"has_rows": kind.has_rows, "one_hot": kind.diagonal_inputs, "bias": bias is not None}
    factors = rules.start(chosen, shape, s, *likes, **how)
    return begun(factors, parts(parameter), shape[0], s, momentum_dtype)


def chosen_structures(
    kind: LayerKind, parameter: Parameter, structures: Any, s: Settings
) -> tuple[type[Structure], type[Structure]]:
    """What K and C are of a parameter of this kind."""
    weight, bias = pair(parameter)
    shape = kind.shape(tuple(weight.shape), bias is not None)
    diagonal = kind.diagonal_inputs, False
    return rules.get(s.rule).choose(structures, shape, diagonal=diagonal, by_rows=kind.has_rows)


def begun(
    factors: rules.Factors,
    parameters: Sequence[Array],
    batch: Shape,
    s: Settings,
    momentum_dtype: Any = None,
) -> LayerState:
    """The state of a layer with these factors before its first step.

    The momentum has the dtype that is given, else the weight's, and float32 for float16.
    """
    costs = [no_cost(p, s) for p in parameters]
    if not has_momentum(s):
        return LayerState.of(factors, None, None, costs)
    dtypes = (momentum_dtype or ranged(p[..., :0]).dtype for p in parameters)
    pairs = zip(parameters, dtypes, strict=True)
    zeros = (namespace(p).zeros_like(p, dtype=dtype) for p, dtype in pairs)
    buffers = [storage("momentum_dtype", m) for m in zeros]
    paired = rules.inputs_of(factors) is not None
    late = Late.zeros(batch, parameters[0], with_bias=paired) if s.normalized else None
    return LayerState.of(factors, buffers, late, costs)


def no_cost(weight: Array, s: Settings) -> Array | None:
    """What rounding has cost a weight before the first step, None unless that is kept."""
    return namespace(weight).zeros_like(weight) if keeps_cost(weight, s) else None


def keeps_cost(weight: Array, s: Settings) -> bool:
    """Whether what rounding costs a weight is kept."""
    return s.rounding == "kahan" and is_half(weight)


def begun_moments(weight: Array, s: Settings) -> Moments:
    """The moments of a parameter that AdamW trains before its first step."""
    return dataclasses.replace(Moments.zeros(weight), compensation=no_cost(weight, s))


def _empty(like: Array, dtype: Any) -> Array:
    """An empty array on the device of `like`, in `dtype` or else one that holds its factors."""
    if dtype is None:
        return ranged(like[..., :0])
    made = namespace(like).empty((0,), dtype=dtype, device=device(like))
    return storage("preconditioner_dtype", made)


def storage(setting: str, made: Array) -> Array:
    """An array that was made in the dtype of a setting.

    Raises:
        ValueError: If that holds no real floating-point numbers, or not those of gradients.
    """
    if not is_inexact(made) or is_complex(made):
        raise ValueError(
            f"{setting} is {made.dtype}: give a dtype of real floating-point numbers, or None"
        )
    if ranged(made).dtype != made.dtype:
        raise ValueError(
            f"{setting} is {made.dtype}, whose range momenta and factors leave with the scale of "
            "the loss: give bfloat16, float32 or None"
        )
    return made


def bytes_of(state: LayerState) -> int:
    """The bytes of a state. The scalars of each matrix, which do not grow with it, are left out."""
    grow = (a for name, a in state.named_arrays() if not name.startswith(_SCALARS))
    return sum(prod(a.shape) * a.dtype.itemsize for a in grow)
