"""What the pure optimizer does with one parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Self, TypeAlias

from singd_core import rules
from singd_core._array import (
    Array,
    as_array,
    device,
    expand,
    is_complex,
    is_inexact,
    namespace,
    ranged,
    total,
    widen,
)
from singd_core._settings import Rate, Settings
from singd_core._tree import T_Tree, Tree, tree
from singd_core.adamw import Fallback, Moments
from singd_core.curvature import Curvature
from singd_core.layers import LayerKind, Linear, Sample, Tensor
from singd_core.layers.base import Shape
from singd_core.rules.shampoo import Shampoo
from singd_core.step import Late, couples_decay, direction, squares_of, weight_change
from singd_core.structures import Diagonal

Parameter: TypeAlias = Array | tuple[Array, Array]  # a weight, or a weight with its bias


@tree
class LayerState(Tree):
    """The state of one layer.

    Attributes:
        factors: Its preconditioner.
        momentum_buffer: The momentum of its weight, shaped like it, or None.
        bias_momentum_buffer: The momentum of its bias, or None.
        late: Sums over late gradients, or None.
    """

    factors: rules.Factors
    momentum_buffer: Array | None
    bias_momentum_buffer: Array | None = None
    late: Late | None = None

    @classmethod
    def of(cls, factors: rules.Factors, momenta: Sequence[Array], late: Late | None) -> Self:
        """With the momenta of the weight and, if there is one, of the bias."""
        weight, *bias = momenta
        return cls(factors, weight, bias[0] if bias else None, late)

    @property
    def momenta(self) -> list[Array] | None:
        """The momenta of the weight and, if there is one, of the bias."""
        if self.momentum_buffer is None:
            return None
        both = self.momentum_buffer, self.bias_momentum_buffer
        return [m for m in both if m is not None]


def pair(parameter: Parameter) -> tuple[Array, Array | None]:
    """The weight and its bias, or None."""
    return parameter if isinstance(parameter, tuple) else (parameter, None)


def parts(parameter: Parameter) -> tuple[Array, ...]:
    """The one or two arrays of a parameter."""
    return parameter if isinstance(parameter, tuple) else (parameter,)


def like(parameter: Parameter, arrays: Sequence[Array]) -> Parameter:
    """The inverse of `parts`."""
    return tuple(arrays) if isinstance(parameter, tuple) else arrays[0]


# ---- what is given -----------------------------------------------------------------------------


def kinds_of(
    layers: Mapping[str, LayerKind] | None, params: Mapping[str, Parameter]
) -> Mapping[str, LayerKind]:
    """The kind of each layer; where none are named, each tuple and each matrix is linear.

    A complex matrix is no layer unless named: a layer is a real map.

    Raises:
        ValueError: If a layer is named that is no parameter.
    """
    if layers is None:
        return {n: Linear() for n, p in params.items() if isinstance(p, tuple) or _is_matrix(p)}
    for name in layers:
        if name not in params:
            raise ValueError(f"layers: {name!r} is no parameter; there are {list(params)}")
    return layers


def tensors_of(
    layers: Mapping[str, LayerKind], params: Mapping[str, Parameter]
) -> dict[str, LayerKind]:
    """The kinds of the other parameters whose gradients are all that their factors want."""
    others: dict[str, Any] = {n: p for n, p in params.items() if n not in layers}
    return {n: Tensor.of(p.shape) for n, p in others.items() if _is_tensor(p)}


def _is_tensor(p: Any) -> bool:
    """Whether it is matrices of real numbers."""
    return Tensor.fits(getattr(p, "shape", ())) and is_inexact(p) and not is_complex(p)


def _is_matrix(weight: Array) -> bool:
    return getattr(weight, "ndim", 0) == 2 and not is_complex(weight)


def check_parameter(name: str, parameter: Parameter, kind: LayerKind | None) -> None:
    """Refuse what is no parameter, or no layer of its kind.

    Raises:
        TypeError: If it is neither an array nor a tuple of two.
        ValueError: If it is not of floating-point numbers, or does not fit the kind.
    """
    shapes_of(name, parameter)
    if not all(map(is_inexact, parts(parameter))):
        raise ValueError(f"{name!r} is not of floating-point numbers: leave it out")
    if kind is None and isinstance(parameter, tuple):
        raise ValueError(f"{name!r} has a bias but is no layer: name it in layers=")
    if kind is None:
        return
    if any(map(is_complex, parts(parameter))):
        raise ValueError(
            f"{name!r} is complex, and {kind} is a real layer: leave it out of layers=, and give a "
            "bias a name of its own; AdamW trains both"
        )
    weight, bias = pair(parameter)
    try:
        batch, d_out, _ = kind.shape(tuple(weight.shape), bias is not None)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    outputs = prod(batch) * d_out
    if bias is not None and prod(bias.shape) != outputs:
        raise ValueError(
            f"{name!r}: the bias has shape {tuple(bias.shape)}, but a weight of shape "
            f"{tuple(weight.shape)} has {outputs} outputs"
        )


def shapes_of(name: str, parameter: Parameter, what: str = "") -> list[tuple[int, ...]]:
    """The shapes of the one or two arrays of a parameter, or `what`, e.g. "the gradient of ".

    Raises:
        TypeError: If it is neither an array nor a tuple of two.
    """
    found = [getattr(part, "shape", None) for part in parts(parameter)]
    if None in found or len(found) > 2 or not found:
        raise TypeError(
            f"{what}{name!r} must be an array or a tuple (weight, bias), "
            f"not {_described(parameter)}"
        )
    return [tuple(shape) for shape in found if shape is not None]


def row_pair(name: str, rows: Any) -> tuple[Array, Array]:
    """The layer's input and the gradient at its output.

    Raises:
        TypeError: If they are not two.
    """
    if isinstance(rows, (tuple, list)) and len(rows) == 2:
        return rows[0], rows[1]
    raise TypeError(
        f"rows of {name!r} must be a pair, the layer's input and the gradient at its output, not "
        f"{_described(rows)}; a layer without rows is left out"
    )


def _described(x: Any) -> str:
    many = f" of {len(x)}" if isinstance(x, (tuple, list)) else ""
    return "None" if x is None else f"a {type(x).__name__}{many}"


# ---- the start ---------------------------------------------------------------------------------


def layer_state(
    kind: LayerKind, parameter: Parameter, structures: Any, dtypes: Sequence[Any], s: Settings
) -> LayerState:
    """The state before the first step; `dtypes` of K and of C, or None.

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
    chosen = rule.choose(structures, shape, diagonal=(kind.diagonal_inputs, False))
    likes = [_empty(weight, dtype) for dtype in dtypes]
    factors = rules.start(
        chosen, shape, s, *likes, has_rows=kind.has_rows, one_hot=kind.diagonal_inputs
    )
    return begun(factors, parts(parameter), shape[0], s)


def begun(
    factors: rules.Factors, parameters: Sequence[Array], batch: Shape, s: Settings
) -> LayerState:
    """The state of a layer with these factors before its first step."""
    if isinstance(s.momentum, (int, float)) and s.momentum == 0.0:
        return LayerState(factors, None)
    buffers = [namespace(p).zeros_like(ranged(p)) for p in parameters]
    late = Late.zeros(batch, parameters[0]) if s.normalized else None
    return LayerState.of(factors, buffers, late)


def _empty(like: Array, dtype: Any) -> Array:
    """An empty array on the device of `like`, in `dtype` or else one that holds its factors."""
    xp = namespace(like)
    return (
        ranged(like[..., :0]) if dtype is None else xp.empty((0,), dtype=dtype, device=device(like))
    )


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
    inputs_of = kind.diagonal_rows if diagonal else kind.inputs
    _, d_out, d_in = kind.shape(tuple(weight.shape), bias is not None)
    of_x, of_g = (
        Sample.of(most, structure, d, step)
        for structure, d in zip(factors.structures, (d_in, d_out), strict=True)
    )
    A, N = inputs_of(x, bias=bias is not None, kfac_approx=kfac_approx, sample=of_x)
    B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average=loss_average, sample=of_g)
    alike = x.shape[0] == g.shape[0] and (of_g is not None or B.shape[-2] == N)
    if (A.shape[-1], B.shape[-1]) != (d_in, d_out) or not alike:
        raise ValueError(
            f"{N} of length {A.shape[-1]} and {B.shape[-2]} of length {B.shape[-1]} do not fit a "
            f"{d_out} × {d_in} matrix and each other"
        )
    inputs, outputs = factors.measure(A, B)
    return Curvature.of(inputs, N, outputs, M)


def refreshed(
    lr_cov: Rate, s: Settings, factors: rules.Factors, curvature: Curvature
) -> rules.Factors:
    """The factors one refresh later."""
    return factors.refresh(curvature, lr_cov, s)


def refreshed_by_gradient(
    kind: LayerKind, lr_cov: Rate, s: Settings, factors: Shampoo, gradient: Array
) -> Shampoo:
    """The factors of a tensor without rows one refresh later."""
    return factors.refresh(factors.curvature(kind.matrix(gradient)), lr_cov, s)


def layer_squares(
    kind: LayerKind, factors: rules.Factors, gradient: Parameter
) -> tuple[Array, Array]:
    """‖∇W‖², of the batch axes' shape, and a number that is finite if it and the factors are."""
    squares = squares_of(kind, parts(gradient))
    known = factors.averages
    return squares, total(squares) + total(known.t_U) + total(known.t_G)


def squares(gradient: Array) -> Array:
    """The sum of the squares of a gradient: finite only if it is."""
    return total(widen(gradient) ** 2)


# ---- the changes, all of them zero unless `ok` -------------------------------------------------


def layer_change(
    kind: LayerKind,
    s: Settings,
    level: Callable[[rules.Factors, Array], rules.Factors],
    parameter: Parameter,
    gradient: Parameter,
    squares: Array,
    old: LayerState,
    factors: rules.Factors,
    ok: Array,
) -> tuple[Parameter, LayerState, Array]:
    """The change of a layer's weight and bias, its new state, and whether all of it is finite.

    Nothing of the layer is changed unless `ok` and that. `level` is told the natural gradient.
    """
    own, weights = old.momenta, parts(parameter)
    decay = [w * expand(s.weight_decay, w) for w in weights] if couples_decay(s) else None
    found = direction(
        kind,
        s,
        partial(factors.precondition, balanced=s.normalized),
        factors.averages.t_U,
        tuple(weights[0].shape),
        parts(gradient),
        decay,
        own,
        old.late,
        squares,
    )
    ok = namespace(ok).logical_and(ok, as_array(found.finite, ok))
    pairs = zip(found.parts, weights, strict=True)
    changes = [_or_zero(ok, weight_change(u, found.scale, w, s)) for u, w in pairs]
    if found.natural is not None:
        factors = level(factors, found.natural)
    new = dataclasses.replace(old, factors=factors)
    if found.momenta is not None:
        late = None if old.late is None or found.late is None else old.late.written(found.late)
        new = LayerState.of(factors, found.momenta, late)
    return like(parameter, changes), new_or_old(ok, new, old), ok


def other_change(
    s: Fallback, moments: Moments, gradient: Array, weight: Array, ok: Array
) -> tuple[Array, Moments]:
    """The change of a parameter that belongs to no layer, and its new moments."""
    change, new = moments.update(gradient, weight, s)
    return _or_zero(ok, change), new_or_old(ok, new, moments)


def new_or_old(ok: Array, new: T_Tree, old: T_Tree) -> T_Tree:
    """The new tree, or the old one."""
    return new.map(lambda n, o: namespace(n).where(ok, n, o), old)


def _or_zero(ok: Array, change: Array) -> Array:
    xp = namespace(change)
    return xp.where(ok, change, xp.zeros_like(change))


def all_finite(sizes: Sequence[Array]) -> Array:
    """Whether the sum of all sizes is finite, 0-d."""
    size = sum(sizes[1:], sizes[0])
    return namespace(size).isfinite(size)


def count_failed(count: Array, moved: Sequence[Array]) -> Array:
    """One more unless everything moved."""
    xp = namespace(count)
    moved = xp.stack(list(moved))
    return count + xp.astype(xp.logical_not(xp.all(moved)), count.dtype)


def added(parameter: Parameter, change: Parameter) -> Parameter:
    """The parameter with its change."""
    pairs = zip(parts(parameter), parts(change), strict=True)
    return like(parameter, [p + u for p, u in pairs])
