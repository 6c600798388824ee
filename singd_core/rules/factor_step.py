"""One step of one factor: its direction, and how far it moves (docs/mathematics.md, section 3)."""

from __future__ import annotations

import math

from singd_core._array import Array, Scalar, widen
from singd_core._scalars import at_least, at_most, clip, number, where
from singd_core._settings import Settings, is_bound
from singd_core.curvature import TINY
from singd_core.structures.base import Structure

# Of β₁ ‖m‖_F, which is at most about √d for a factor that is as large as its curvature wants it.
OUTGROWN = 1e6
MOST = 1e15  # of the entries of m: squares of more may leave the range of float32


def direction(
    m_K: Structure | None,
    H_K: Structure,
    KtK: Structure,
    of_H: Scalar,
    of_gram: Scalar,
    s: Settings,
) -> Structure:
    """M ← α₁ m + ½ (h H_K + λ Π̂(KᵀK) − I), in the dtype of H_K (3.2, 3.3). The same for C.

    Args:
        m_K: m, or None.
        H_K: Π̂(Kᵀ U K).
        KtK: Π̂(Kᵀ K).
        of_H: ½ h, with the adaptive curvature h (1 for IKFAC).
        of_gram: ½ λ, with the adaptive damping (λ for IKFAC).
        s: The settings.
    """
    m = H_K.scale(of_H).add_scaled(of_gram, KtK).shifted(-half(m_K, s))
    return m if m_K is None else m.add_scaled(s.alpha1, m_K.astype(m.like))


def half(m: Structure | None, s: Settings) -> Scalar:
    """The ½ in front of the bracket of m, or ½ (1 − α₁) with the authors' normalization."""
    return 0.5 * (1.0 - s.alpha1) if s.normalize_lr_cov and m is not None else 0.5


def step_size(m: Structure, norm: Scalar, beta: Scalar, s: Settings) -> Scalar:
    """β₁ of one factor, normalized or bounded (5.5) as the settings ask for.

    The norm of m may be infinite or zero. It is not asked for where nothing bounds the step.
    """
    if s.normalize_lr_cov:
        beta = beta / at_least(number(m.max_abs()), 1.0)
    return (
        at_most(s.factor_bound / at_least(norm, TINY), beta) if is_bound(s.factor_bound) else beta
    )


def in_range(m: Array) -> Array:
    """A direction without what has left the range of float32, or nearly.

    A sum of products that leave it is infinite, or NaN if their signs differ: which of both depends
    on the order of the sum. NaN counts as the largest number, so that the factor shrinks too.
    """
    return clip(where(m == m, m, MOST), -MOST, MOST)


def shrunk(step: Scalar) -> Scalar:
    """What a factor is multiplied by whose curvature has outgrown it, from β₁ ‖m‖_F; else 1 (5.5b).

    A bounded step changes its scale by little, and products with it would leave the range of
    float32 for long. A balanced natural gradient does not depend on the scale of a factor.
    """
    return OUTGROWN / at_least(step, OUTGROWN)


def stepped(K: Structure, m: Structure, start: Scalar, step: Scalar, s: Settings) -> Structure:
    """K ← c K Expm(−β₁ m), in the dtype of m, or in float32 if that has 16 bits (3.4).

    Args:
        K: The factor.
        m: Its direction.
        start: c, by which K is multiplied before it steps (5.3, 5.5b).
        step: −c β₁.
        s: The settings.
    """
    wide, by = K.astype(m.like), m.scale(step)  # first, since a product with m may overflow
    term = wide.matmul(by)  # torch.compile cannot trace `@`
    K_new = term.map(widen).add_scaled(start, wide.map(widen))
    for j in range(2, s.order + 1):
        term = term.matmul(by)
        of_term = at_least(start, TINY) ** (1 - j)  # the start of an infinite curvature is 0
        K_new = K_new.add_scaled(of_term / math.factorial(j), term.map(widen))
    return K_new


def stored(m: Structure, like: Structure | None) -> Structure | None:
    """A direction in the dtype of the momentum that is kept, None if none is."""
    return None if like is None else m.astype(like.like)
