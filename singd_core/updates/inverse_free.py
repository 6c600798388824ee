"""The inverse-free update of the factors: SINGD, INGD and IKFAC as settings of one function."""

from __future__ import annotations

from typing import Self

from singd_core._array import Array, Scalar, cast, namespace
from singd_core._tree import Tree, tree
from singd_core.settings import Rate, Settings, is_bound
from singd_core.structures.base import Structure
from singd_core.updates.curvature import Averages, Curvature, Measured, measure


@tree
class InverseFree(Tree):
    """The factors of one layer's inverse curvature: K Kᵀ ≈ (U + λ_K I)⁻¹, C Cᵀ ≈ (G + λ_C I)⁻¹.

    Attributes:
        K: Side d_in.
        C: Side d_out.
        m_K: The Riemannian momentum of K, None without (α₁ = 0).
        m_C: That of C.
        averages: Mean diagonals of U and G so far.
    """

    K: Structure
    C: Structure
    m_K: Structure | None
    m_C: Structure | None
    averages: Averages

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """Π̂(KᵀAᵀA K) and Π̂(CᵀBᵀB C) of rows A, shape (..., n, d_in), and B, (..., n, d_out)."""
        return measure(self.K, A), measure(self.C, B)

    def precondition(self, gradient: Array) -> Array:
        """The natural gradient C Cᵀ ∇W K Kᵀ of ∇W, shape (..., d_out, d_in), in the dtype of C."""
        right = self.K.precondition(cast(gradient, self.K.like).mT).mT
        return self.C.precondition(cast(right, self.C.like))

    def refresh(self, curvature: Curvature, lr_cov: Rate, s: Settings) -> Self:
        """One step of K and C (docs/mathematics.md, section 3)."""
        averages = self.averages.update(curvature, lr_cov, s)
        lambda_K, lambda_C = averages.damping(s)
        K_start, C_start = self.averages.start(lambda_K, lambda_C, averages, s)
        # Scaling the factors by c multiplies what was measured with them, and their Grams, by c².
        s_K, s_C = K_start * K_start, C_start * C_start
        H_K, H_C = curvature.H_K, curvature.H_C
        KtK, CtC = self.K.astype(H_K.like).gram(), self.C.astype(H_C.like).gram()
        h_K, h_C = 1.0, 1.0
        if not s.kfac_like:
            if s.relative_damping:
                lambda_K = lambda_C = s.damping * averages.t_U * averages.t_G
            d_in, d_out = H_K.shape[-1], H_C.shape[-1]
            h_K, h_C = s_C * H_C.trace() / d_out, s_K * H_K.trace() / d_in
            lambda_K = lambda_K * s_C * CtC.trace() / d_out
            lambda_C = lambda_C * s_K * KtK.trace() / d_in
        beta = self.averages.step_size(curvature, lr_cov, s)
        K, m_K = step(self.K, self.m_K, H_K, KtK, h_K * s_K, lambda_K * s_K, K_start, beta, s)
        C, m_C = step(self.C, self.m_C, H_C, CtC, h_C * s_C, lambda_C * s_C, C_start, beta, s)
        return type(self)(K, C, m_K, m_C, averages)


def step(
    K: Structure,
    m_K: Structure | None,
    H_K: Structure,
    KtK: Structure,
    h: Scalar,
    damping: Scalar,
    start: Scalar,
    beta: Scalar,
    s: Settings,
) -> tuple[Structure, Structure | None]:
    """M ← α₁ m + ½ (h H_K + λ Π̂(KᵀK) − I),  K ← c K Expm(−β₁ m), in the dtype of H_K.

    Args:
        K: The factor.
        m_K: Its Riemannian momentum, or None.
        H_K: Π̂(Kᵀ U K).
        KtK: Π̂(Kᵀ K).
        h: The adaptive curvature (1 for IKFAC).
        damping: The adaptive damping (λ for IKFAC).
        start: c, the scale of the start: 1 from the second refresh on.
        beta: The step size β₁ before its bounds.
        s: The settings.

    Returns:
        The new K and m_K, in their dtypes.
    """
    alpha1 = 0.0 if s.kfac_like else s.alpha1
    half = 0.5 * (1.0 - alpha1) if s.normalize_lr_cov else 0.5
    m = (H_K.scale(half * h) + KtK.scale(half * damping)).add_identity(-half)
    if m_K is not None and not s.kfac_like:
        m = m + m_K.astype(m.like).scale(alpha1)
    xp = namespace(m.like)
    if s.normalize_lr_cov:
        beta = beta / xp.maximum(m.max_abs(), xp.ones_like(m.max_abs()))
    if is_bound(s.factor_bound):
        norm = m.norm()
        # ‖m‖ may overflow, and infinity times a β₁ of 0 would be no number
        norm = xp.minimum(norm, xp.full_like(norm, float(xp.finfo(norm.dtype).max)))
        norm = norm * beta * (1.0 / s.factor_bound)
        beta = beta / xp.maximum(norm, xp.ones_like(norm))
    wide = K.astype(m.like)
    K_new = term = wide.scale(start)
    for j in range(1, s.order + 1):
        term = term.matmul(m).scale(-beta / j)  # torch.compile cannot trace `@`
        K_new = K_new + term
    return K_new.astype(K.like), None if m_K is None else m.astype(m_K.like)
