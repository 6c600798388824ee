"""What the pure optimizer does with one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from singd_core import preconditioner
from singd_core._array import Array, Scalar, device, expand, full, namespace, ranged, total, widen
from singd_core._settings import Rate, Settings
from singd_core._tree import T_Tree, Tree, tree
from singd_core.curvature import LayerKind
from singd_core.structures import Diagonal
from singd_core.updates.adamw import Fallback, Moments
from singd_core.updates.curvature import Curvature
from singd_core.updates.inverse_free import InverseFree
from singd_core.updates.weights import (
    couples_decay,
    direction,
    inner,
    rms_scale,
    weight_change,
)

Parameter: TypeAlias = Array | tuple[Array, Array]  # a weight, or a weight with its bias


@tree
class LayerState(Tree):
    """The state of one layer.

    Attributes:
        factors: Its preconditioner.
        momentum_buffer: The momentum of its weight matrix, bias included, or None.
    """

    factors: preconditioner.Factors
    momentum_buffer: Array | None


def pair(parameter: Parameter) -> tuple[Array, Array | None]:
    """The weight and its bias, or None."""
    return parameter if isinstance(parameter, tuple) else (parameter, None)


def parts(parameter: Parameter) -> tuple[Array, ...]:
    """The one or two arrays of a parameter."""
    return parameter if isinstance(parameter, tuple) else (parameter,)


def like(parameter: Parameter, arrays: Sequence[Array]) -> Parameter:
    """The inverse of `parts`."""
    return tuple(arrays) if isinstance(parameter, tuple) else arrays[0]


# ---- the start ---------------------------------------------------------------------------------


def layer_state(
    kind: LayerKind, parameter: Parameter, structures: Any, dtypes: Sequence[Any], s: Settings
) -> LayerState:
    """The state before the first step; `dtypes` of K and of C, or None.

    Raises:
        ValueError: If KFAC is asked for a table of embeddings.
    """
    if s.kfac and kind.diagonal_inputs:
        raise ValueError(f"KFAC inverts dense factors, and {kind} has none: leave it out of layers")
    weight, bias = pair(parameter)
    shape = kind.shape(tuple(weight.shape), bias is not None)
    K, C = preconditioner.resolve(structures, shape, kfac=s.kfac)
    K = Diagonal if kind.diagonal_inputs else K
    factors = preconditioner.init((K, C), shape, s, *(_empty(weight, dtype) for dtype in dtypes))
    if isinstance(s.momentum, (int, float)) and s.momentum == 0.0:
        return LayerState(factors, None)
    return LayerState(factors, full((*shape[0], *shape[1:]), 0.0, like=ranged(weight)))


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
    loss_average: str | None,
    factors: preconditioner.Factors,
    x: Array,
    g: Array,
) -> Curvature:
    """The curvature of a layer's input and output gradient.

    Raises:
        ValueError: If they do not fit the layer.
    """
    weight, bias = pair(parameter)
    diagonal = isinstance(factors, InverseFree) and isinstance(factors.K, Diagonal)
    inputs_of = kind.diagonal_rows if diagonal else kind.inputs
    A, N = inputs_of(x, bias=bias is not None, kfac_approx=kfac_approx)
    B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average=loss_average)
    _, d_out, d_in = kind.shape(tuple(weight.shape), bias is not None)
    if (A.shape[-1], B.shape[-1]) != (d_in, d_out) or B.shape[-2] != N:
        raise ValueError(
            f"{N} of length {A.shape[-1]} and {B.shape[-2]} of length {B.shape[-1]} do not fit a "
            f"{d_out} × {d_in} matrix and each other"
        )
    inputs, outputs = factors.measure(A, B)
    return Curvature.of(inputs, N, outputs, M)


def refreshed(
    lr_cov: Rate, s: Settings, factors: preconditioner.Factors, curvature: Curvature
) -> preconditioner.Factors:
    """The factors one refresh later."""
    return factors.refresh(curvature, lr_cov, s)


def natural_gradient(
    kind: LayerKind, s: Settings, factors: preconditioner.Factors, gradient: Parameter
) -> tuple[Array, Scalar, Array]:
    """The natural gradient n as a matrix, the scale that bounds it, and ⟨∇W, n⟩ so scaled."""
    matrix = kind.matrix(*pair(gradient))
    natural = factors.precondition(matrix)
    scale = rms_scale(natural, s.rms_bound)
    return natural, scale, total(scale * inner(matrix, natural))


def squares(gradient: Array) -> Array:
    """The sum of the squares of a gradient: finite only if it is."""
    return total(widen(gradient) ** 2)


# ---- the changes, all of them zero unless `ok` -------------------------------------------------


def layer_change(
    kind: LayerKind,
    s: Settings,
    natural: Array,
    scale: Scalar,
    kl: Scalar,
    parameter: Parameter,
    momentum: Array | None,
    ok: Array,
) -> tuple[Parameter, Array | None]:
    """The change of a layer's weight and bias, and the new momentum."""
    weight, bias = pair(parameter)
    matrix = kind.matrix(weight, bias)
    decay = matrix * expand(s.weight_decay, matrix) if couples_decay(s) else None
    u, new = direction(natural, decay, momentum, scale * kl, s)
    change = weight_change(u, rms_scale(u, s.rms_bound), matrix, s)
    change = kind.split(change, tuple(weight.shape), bias is not None)
    changes = [_or_zero(ok, part) for part in change if part is not None]
    if momentum is not None:
        new = namespace(new).where(ok, new, momentum)
    return like(parameter, changes), new


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


def count_failed(count: Array, ok: Array) -> Array:
    """One more unless `ok`."""
    xp = namespace(ok)
    return count + xp.astype(xp.logical_not(ok), count.dtype)


def added(parameter: Parameter, change: Parameter) -> Parameter:
    """The parameter with its change."""
    pairs = zip(parts(parameter), parts(change), strict=True)
    return like(parameter, [p + u for p, u in pairs])
