"""The step of the weights: the bounds, the momentum and the decay of a natural gradient.

Everything here is of matrices, shape (..., d_out, d_in): leading axes are layers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from singd_core._array import Array, Scalar, cast, expand, multiply_add, namespace, widen
from singd_core.settings import Rate, Settings, is_bound
from singd_core.structures.base import Structure


def inner(gradient: Array, natural: Array) -> Array:
    """⟨∇W, n⟩ of the batch axes' shape, in at least float32. It is finite only if both are."""
    n = widen(natural)
    xp, shape = namespace(n), (*n.shape[:-2], n.shape[-2] * n.shape[-1])
    # as vectors: torch multiplies two of them without the array of all products
    return xp.vecdot(xp.reshape(cast(gradient, n), shape), xp.reshape(n, shape), axis=-1)


def rms_scale(x: Array, bound: Rate) -> Scalar:
    """min(1, bound / RMS(x)) of the batch axes' shape, in at least float32.

    For the natural gradient before the momentum, in which a huge one would outlast what the KL
    bound later allows to undo it; and for the update.
    """
    if not is_bound(bound):
        return 1.0
    xp = namespace(x)
    norm = xp.linalg.vector_norm(widen(x), axis=(-2, -1))
    limit = xp.zeros_like(norm) + bound * math.sqrt(x.shape[-2] * x.shape[-1])
    return limit / xp.maximum(norm, limit)


def two_sided(
    gradient: Array,
    K: Structure,
    times_K: Callable[[Array], Array],
    C: Structure,
    times_C: Callable[[Array], Array],
) -> Array:
    """The natural gradient P_C ∇W P_K of ∇W, shape (..., d_out, d_in), in the dtype of C.

    Args:
        gradient: ∇W.
        K: Tells the dtype of the product with P_K.
        times_K: The product P_K X of a symmetric P_K.
        C: Tells the dtype of the product with P_C.
        times_C: The product P_C X.
    """
    right = times_K(cast(gradient, K.like).mT).mT
    return times_C(cast(right, C.like))


def kl_scale(energy: Array, kl_bound: Rate) -> Scalar:
    """min(1, √(κ / E)) with E = Σ lr² ⟨∇W, n⟩: scales the natural gradient into a trust region.

    ½ E is the KL divergence of a step of rate lr along n, to second order.
    """
    if not is_bound(kl_bound):
        return 1.0
    xp, zero = namespace(energy), namespace(energy).zeros_like(energy)
    return 1.0 / xp.maximum(xp.sqrt(xp.maximum(energy, zero) / kl_bound), zero + 1.0)


def direction(
    natural: Array,
    decay: Array | None,
    momentum: Array | None,
    scale: Scalar,
    s: Settings,
    *,
    donate: bool = False,
) -> tuple[Array, Scalar, Array | None]:
    """The direction c u of the step W ← W − lr c u, as u and c, and the new momentum m.

    m ← α₂ m + c' n (+ γ W unless the decay is decoupled);  u = m, or n + α₂ m (Nesterov);
    c = min(1, bound / RMS(u)).

    Args:
        natural: n.
        decay: γ W if `couples_decay(s)`, else None.
        momentum: m, or None without momentum.
        scale: c', from `rms_scale` and `kl_scale`: a number, or of the batch axes' shape.
        s: The settings.
        donate: Whether `natural` and `momentum` may be overwritten, where arrays can be.
    """
    u = _times(scale, natural, in_place=donate)
    if decay is not None:
        u += cast(decay, u)
    if momentum is not None:
        u, alpha = cast(u, momentum), expand(s.momentum, momentum)
        momentum = multiply_add(momentum, alpha, u, out=momentum if donate else None)
        u = multiply_add(momentum, alpha, u, out=u if donate else None) if s.nesterov else momentum
    c = rms_scale(u, s.rms_bound)
    if u.ndim > 2 and not isinstance(c, float):  # the parts of u will have other axes
        return _times(c, u, in_place=u is not momentum), 1.0, momentum
    return u, c, momentum


def weight_change(
    u: Array, c: Scalar, weight: Array, s: Settings, onto: Array | None = None
) -> Array:
    """−lr c u, and −lr γ W for a decoupled decay, in the dtype of W, added `onto` an array.

    u and c are those of `direction`.
    """
    if s.decoupled_weight_decay and _is_on(s.weight_decay):
        onto = _plus(weight, -1.0 * s.lr * s.weight_decay, onto)
    return _plus(cast(u, weight), -1.0 * s.lr * c, onto)


def _plus(x: Array, c: Scalar, y: Array | None) -> Array:
    c = expand(c, x)
    return x * c if y is None else multiply_add(x, c, y, out=y)


def _times(c: Scalar, x: Array, *, in_place: bool) -> Array:
    if not in_place:
        return x * expand(c, x)
    if not (isinstance(c, float) and c == 1.0):
        x *= expand(c, x)
    return x


def couples_decay(s: Settings) -> bool:
    """Whether the weight decay goes through the momentum."""
    return not s.decoupled_weight_decay and _is_on(s.weight_decay)


def _is_on(value: Rate) -> bool:
    return not (isinstance(value, (int, float)) and value == 0.0)
