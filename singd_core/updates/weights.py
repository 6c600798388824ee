"""The step of the weights: the bounds, the momentum and the decay of a natural gradient."""

from __future__ import annotations

from array_api_compat import size

from singd_core._array import (
    Array,
    Scalar,
    cast,
    chain,
    expand,
    namespace,
    sum_of_squares,
    widen,
)
from singd_core.settings import Rate, Settings, is_bound


def inner(gradient: Array, natural: Array) -> Array:
    """⟨∇W, n⟩, a 0-d array in at least float32. It is finite only if both are."""
    n = widen(natural)
    g, xp = cast(gradient, n), namespace(n)
    return xp.sum(xp.vecdot(g, n, axis=-1)) if n.ndim else g * n


def bounded(natural: Array, energy: Array, s: Settings) -> tuple[Array, Array]:
    """N min(1, bound / RMS(n)), and with it ⟨∇W, n⟩ or a multiple of that.

    Before the momentum: a huge n in it would outlast what the KL bound later allows to undo it.
    """
    if not is_bound(s.rms_bound):
        return natural, energy
    c = _within_rms(natural, s.rms_bound)
    return natural * cast(c, natural), energy * cast(c, energy)


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

    m ← α₂ m + n (+ γ W unless the decay is decoupled);  u = m, or n + α₂ m (Nesterov);
    u ← u min(1, bound / RMS(u)).

    Args:
        natural: n, shape (..., d_out, d_in), from `bounded`.
        decay: γ W in the same shape if `couples_decay(s)`, else None.
        momentum: m, or None without momentum.
        scale: Factor of n, from `kl_scale`.
        s: The settings.
    """
    n, scale = natural, expand(scale, natural)
    if decay is not None:
        n, scale = n * scale + cast(decay, n), 1.0
    if momentum is None:
        u = n * scale
    elif s.nesterov:
        u, momentum = _nesterov(n, momentum, scale, expand(s.momentum, momentum))
    else:
        u = momentum = _heavy_ball(n, momentum, scale, expand(s.momentum, momentum))
    if is_bound(s.rms_bound):
        u = u * cast(_within_rms(u, s.rms_bound), u)
    return u, momentum


@chain
def _heavy_ball(n: Array, m: Array, scale: Scalar, alpha: Scalar) -> Array:
    return m * alpha + cast(n * scale, m)


@chain
def _nesterov(n: Array, m: Array, scale: Scalar, alpha: Scalar) -> tuple[Array, Array]:
    u = cast(n * scale, m)
    m = m * alpha + u
    return u + m * alpha, m


def weight_change(u: Array, weight: Array, s: Settings) -> Array:
    """−lr u, and −lr γ W for a decoupled decay, in the dtype of W."""
    u = cast(u, weight)
    if s.decoupled_weight_decay and _is_on(s.weight_decay):
        u = u + weight * expand(s.weight_decay, weight)
    return u * expand(-1.0 * s.lr, u)


def couples_decay(s: Settings) -> bool:
    """Whether the weight decay goes through the momentum."""
    return not s.decoupled_weight_decay and _is_on(s.weight_decay)


def _within_rms(x: Array, bound: Rate) -> Array:
    """min(1, bound / RMS(x)), 0-d, in at least float32."""
    xp = namespace(x)
    rms = xp.sqrt(sum_of_squares(x, x.ndim) / size(x))
    return 1.0 / xp.maximum(rms / bound, xp.ones_like(rms))


def _is_on(value: Rate) -> bool:
    return not (isinstance(value, (int, float)) and value == 0.0)
