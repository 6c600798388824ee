"""What a step of the pure optimizer does with one parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from singd_core import rules
from singd_core._array import (
    Array,
    cast,
    device,
    expand,
    is_inexact,
    namespace,
    sum_of_squares,
    total,
    widen,
)
from singd_core._layer_state import NAMES, LayerState, Parameter, like, pair, parts
from singd_core._scalars import as_array
from singd_core._settings import Rate, Settings, StepSettings
from singd_core._tree import T_Tree
from singd_core.adamw import Fallback, Moments
from singd_core.curvature import Curvature
from singd_core.late import ROOM
from singd_core.layers import LayerKind, Sample
from singd_core.rounding import Rounding
from singd_core.rules.shampoo import Shampoo
from singd_core.step import (
    couples_decay,
    direction,
    new_weight,
    squares_of,
    weight_change,
)
from singd_core.structures import Diagonal
from singd_core.without_mean import learned, without_mean


def count_state(parameter: Parameter) -> Array:
    """A count of nothing yet, 0-d."""
    weight = pair(parameter)[0]
    return namespace(weight).zeros((), dtype=namespace(weight).int32, device=device(weight))


# ---- before anything is changed ----------------------------------------------------------------


def layer_curvature(
    kind: LayerKind,
    parameter: Parameter,
    kfac_approx: str,
    loss_average: str | int | None,
    most: float,
    step: Any,
    factors: rules.Factors,
    x: Array,
    g: Array,
) -> Curvature:
    """The curvature of a layer's input and output gradient.

    Raises:
        ValueError: If they do not fit the layer.
    """
    weight, bias = pair(parameter)
    diagonal = issubclass(factors.structures[0], Diagonal)
    shape = kind.shape(tuple(weight.shape), bias is not None)
    samples = Sample.of_both(most, factors.structures, shape, step)
    how = kfac_approx, loss_average, samples
    A, N, B, M = layer_rows(kind, parameter, x, g, *how, diagonal=diagonal)
    inputs, outputs = factors.measure(A, B)
    return Curvature.of(inputs, N, outputs, M)


def layer_rows(
    kind: LayerKind,
    parameter: Parameter,
    x: Array,
    g: Array,
    kfac_approx: str,
    loss_average: str | int | None,
    samples: tuple[Sample | None, Sample | None] = (None, None),
    *,
    diagonal: bool = False,
) -> tuple[Array, int, Array, int]:
    """The rows A and their number N, and the rows B and the number M of loss terms.

    A `diagonal` K wants no more than `diagonal_rows`.

    Raises:
        ValueError: If they do not fit the layer.
    """
    weight, bias = pair(parameter)
    # numbers, and no indices: squares of bytes leave their range
    if not (kind.diagonal_inputs or is_inexact(x)):
        x = cast(x, widen(weight))
    inputs_of = kind.diagonal_rows if diagonal else kind.inputs
    _, d_out, d_in = kind.shape(tuple(weight.shape), bias is not None)
    of_x, of_g = samples
    A, N = inputs_of(x, bias=bias is not None, kfac_approx=kfac_approx, sample=of_x)
    B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average=loss_average, sample=of_g)
    if kind.row_parts != (None,):
        raise ValueError(f"each part of {kind} has rows: give each a name and a kind of its own")
    # a mean over all positions has as many terms, also where rows are fewer
    positions = partial(kind.outputs, g, kfac_approx="expand", loss_average="batch+sequence")
    n_x, n_g = N, B.shape[-2]
    if kfac_approx == "reduce":
        n_x = kind.inputs(x, bias=False, kfac_approx="expand", sample=Sample(1))[1]
        n_g = positions(sample=Sample(1))[1]
    elif of_g is not None:
        n_g = positions(sample=of_g)[1]
    # a batch of one each, without an axis for it
    single = x.ndim <= g.ndim == weight.ndim - 1
    alike = (single or x.shape[:1] == g.shape[:1]) and n_x == n_g
    if (A.shape[-1], B.shape[-1]) != (d_in, d_out) or not alike:
        raise ValueError(
            f"{n_x} of length {A.shape[-1]} and {n_g} of length {B.shape[-1]} do not fit a "
            f"{d_out} × {d_in} matrix and each other"
        )
    return A, N, B, M


def refreshed(
    lr_cov: Rate,
    s: Settings,
    rounding: Rounding | None,
    factors: rules.Factors,
    curvature: Curvature,
) -> rules.Factors:
    """The factors one refresh later."""
    return factors.refresh(curvature, lr_cov, s, rounding=rounding)


def refreshed_by_gradient(
    kind: LayerKind,
    lr_cov: Rate,
    s: Settings,
    rounding: Rounding | None,
    factors: Shampoo,
    gradient: Parameter,
) -> Shampoo:
    """The factors of a tensor without rows one refresh later."""
    return learned(factors, kind, parts(gradient), lr_cov, s, None, rounding)


def layer_squares(
    kind: LayerKind, factors: rules.Factors, gradient: Parameter
) -> tuple[Array, Array]:
    """‖∇W‖², of the batch axes' shape, and a number that is finite if it and the factors are.

    And if sums over such squares are.
    """
    _, bias = pair(gradient)
    squares, known = squares_of(kind, parts(gradient)), factors.averages
    size = ROOM * total(squares) + total(known.t_U) + total(known.t_G)
    if bias is not None and rules.inputs_of(factors) is not None:  # it is no column
        size = size + sum_of_squares(bias, bias.ndim)
    return squares, size


def squares(gradient: Array) -> Array:
    """The sum of the squares of a gradient: finite only if it is."""
    return total(widen(gradient) ** 2)


# ---- the changes, all of them zero unless `ok` -------------------------------------------------


def layer_change(
    kind: LayerKind,
    s: StepSettings,
    level: Callable[[rules.Factors, Array], rules.Factors],
    rounding: Rounding | None,
    parameter: Parameter,
    gradient: Parameter,
    squares: Array,
    old: LayerState,
    factors: rules.Factors,
    ok: Array,
) -> tuple[Parameter, LayerState, Array]:
    """The change of a layer's weight and bias, its new state, and whether all of it is finite.

    Nothing of the layer is changed unless `ok` and that. `level` is told the natural gradient, and
    `rounding` says how the weight and its bias are stored, None to the nearest number.
    """
    own, weights = old.momenta, parts(parameter)
    decay = [w * expand(s.weight_decay, w) for w in weights] if couples_decay(s) else None
    precondition = partial(factors.precondition, balanced=s.normalized)
    of_layer = tuple(weights[0].shape), parts(gradient), decay, own, old.late
    inputs = rules.inputs_of(factors)
    if inputs is None:
        t_U = factors.averages.t_U
        found = direction(kind, s, precondition, t_U, *of_layer, squares)
    else:
        column = factors.preconditioner(1, balanced=True).left
        found = without_mean(kind, s, precondition, column, inputs, *of_layer)
    ok = namespace(ok).logical_and(ok, as_array(found.finite, ok))
    changes, costs = [], []
    each = zip(NAMES, found.parts, found.scales, weights, old.compensations, strict=False)
    for name, u, c, w, cost in each:
        if rounding is None or not rounding.rounds(name):
            change = weight_change(u, c, w, s)
        else:
            stored, cost = new_weight(u, c, w, s, rounding, name, cost=cost)
            change = cast(stored - widen(w), w)
        changes.append(_or_zero(ok, change))
        costs.append(cost)
    if found.natural is not None:
        factors = level(factors, found.natural)
    late = old.late
    if late is not None and found.late is not None:
        late = late.written(found.late)
    new = LayerState.of(factors, found.momenta, late, costs)
    return like(parameter, changes), new_or_old(ok, new, old), ok


def other_change(
    s: Fallback,
    rounding: Rounding | None,
    moments: Moments,
    gradient: Array,
    weight: Array,
    ok: Array,
) -> tuple[Array, Moments]:
    """The change of a parameter that belongs to no layer, and its new moments."""
    if rounding is None:
        change, new = moments.update(gradient, weight, s)
        return _or_zero(ok, change), new_or_old(ok, new, moments)
    wide = widen(weight)
    change, new = moments.update(gradient, wide, s)
    stored, cost = rounding.stored(wide + change, "weight", cost=moments.compensation)
    change, new = cast(stored - wide, weight), dataclasses.replace(new, compensation=cost)
    return _or_zero(ok, change), new_or_old(ok, new, moments)


def new_or_old(ok: Array | bool, new: T_Tree, old: T_Tree) -> T_Tree:
    """The new tree, or the old one."""
    if isinstance(ok, bool):
        return new if ok else old
    return new.map(lambda n, o: namespace(n).where(ok, n, o), old)


def _or_zero(ok: Array, change: Array) -> Array:
    xp = namespace(change)
    return xp.where(ok, change, xp.zeros_like(change))


def all_finite(sizes: Sequence[Array], rates: Sequence[Array]) -> Array:
    """Whether the sum of all sizes is finite, and each rate finite and not negative, 0-d."""
    xp = namespace(sizes[0])
    known = total(xp.stack(list(sizes)))  # XLA would fuse a chain of sums into all uses
    ok = xp.isfinite(known)
    for rate in rates:
        own = expand(rate, known)
        ok = ok & (own >= 0.0) & (own < math.inf)
    return ok


def count_failed(count: Array, moved: Sequence[Array]) -> Array:
    """One more unless everything moved."""
    xp = namespace(count)
    moved = xp.stack(list(moved))
    return count + xp.astype(xp.logical_not(xp.all(moved)), count.dtype)


def added(parameter: Parameter, change: Parameter) -> Parameter:
    """The parameter with its change."""
    pairs = zip(parts(parameter), parts(change), strict=True)
    return like(parameter, [p + u for p, u in pairs])
