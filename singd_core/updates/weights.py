"""The step of the weights: the bounds, the momentum and the decay of a natural gradient.

Everything here is of matrices, shape (..., d_out, d_in): leading axes are layers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from singd_core._array import Array, Scalar, cast, expand, namespace, widen
from singd_core.settings import Rate, Settings, is_bound
from singd_core.structures.base import Structure


def inner(gradient: Array, natural: Array) -> Array:
    """⟨∇W, n⟩ of the batch axes' shape, in at least float32. It is finite only if both are."""
    n = widen(natural)
    xp = namespace(n)
    return xp.sum(xp.vecdot(cast(gradient, n), n, axis=-1), axis=-1)


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
    natural: Array, decay: Array | None, momentum: Array | None, scale: Scalar, s: Settings
) -> tuple[Array, Array | None]:
    """The direction u of the step W ← W − lr u, and the new momentum m.

    m ← α₂ m + c n (+ γ W unless the decay is decoupled);  u = m, or n + α₂ m (Nesterov);
    u ← u min(1, bound / RMS(u)).

    Args:
        natural: n.
        decay: γ W if `couples_decay(s)`, else None.
        momentum: m, or None without momentum.
        scale: c, from `rms_scale` and `kl_scale`: a number, or of the batch axes' shape.
        s: The settings.
    """
    u = natural * expand(scale, natural)
    if decay is not None:
        u += cast(decay, u)
    if momentum is not None:
        momentum = momentum * expand(s.momentum, momentum)
        momentum += cast(u, momentum)
        u = cast(u, momentum) + momentum * expand(s.momentum, momentum) if s.nesterov else momentum
    return u * expand(rms_scale(u, s.rms_bound), u), momentum


def weight_change(u: Array, weight: Array, s: Settings) -> Array:
    """−lr u, and −lr γ W for a decoupled decay, in the dtype of W."""
    u = cast(u, weight)
    change = u * expand(-1.0 * s.lr, u)
    if s.decoupled_weight_decay and _is_on(s.weight_decay):
        change += weight * expand(-1.0 * s.lr * s.weight_decay, weight)
    return change


def couples_decay(s: Settings) -> bool:
    """Whether the weight decay goes through the momentum."""
    return not s.decoupled_weight_decay and _is_on(s.weight_decay)


def _is_on(value: Rate) -> bool:
    return not (isinstance(value, (int, float)) and value == 0.0)
