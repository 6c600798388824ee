"""The inverse-free update of the factors: SINGD, INGD and IKFAC as settings of one function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

from singd_core._array import Array, Scalar, at_least, at_most, number
from singd_core._settings import Rate, Settings, is_bound
from singd_core._tree import Tree, tree
from singd_core.curvature import TINY, Averages, Curvature, Measured, Rates, measure
from singd_core.levels import Levels
from singd_core.preconditioner import Preconditioner, balance, products
from singd_core.structures.base import Structure


@tree
class InverseFree(Tree):
    """The factors of one layer's inverse curvature: K Kᵀ ≈ (U + λ_K I)⁻¹, C Cᵀ ≈ (G + λ_C I)⁻¹.

    Attributes:
        K: Side d_in.
        C: Side d_out.
        m_K: The Riemannian momentum of K, None without (α₁ = 0).
        m_C: The Riemannian momentum of C.
        averages: Mean diagonals of U and G so far.
        levels: How large rows and columns of natural gradients are, None where nobody asks.
    """

    K: Structure
    C: Structure
    m_K: Structure | None
    m_C: Structure | None
    averages: Averages
    levels: Levels | None = None

    @property
    def structures(self) -> tuple[type[Structure], type[Structure]]:
        """The structures of K and of C."""
        return type(self.K), type(self.C)

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """Π̂(KᵀAᵀA K) and Π̂(CᵀBᵀB C) of rows A, shape (..., n, d_in), and B, (..., n, d_out)."""
        return measure(self.K, A), measure(self.C, B)

    def measuring(self) -> Self:
        """What `measure` needs; the rest is None."""
        return type(self)(self.K, self.C, None, None, None)  # type: ignore[arg-type]

    def precondition(self, gradient: Array, *, balanced: bool = False) -> Array:
        """The natural gradient C Cᵀ ∇W K Kᵀ of ∇W, shape (..., d_out, d_in), in the dtype of C.

        `balanced` is told of in `Preconditioner`.
        """
        return Preconditioner.of(None, None, self, self._scales(balanced=balanced))(gradient)

    def preconditioner(
        self, T: int, *, balanced: bool = False, scales: Sequence[Array] | None = None
    ) -> Preconditioner:
        """`precondition` for T steps: with K Kᵀ and C Cᵀ formed once where that multiplies less.

        `scales` are what balances K and C, if that is known.
        """
        d_in, d_out = self.K.shape[-1], self.C.shape[-1]
        P_K, P_C = _square(self.K, T * d_out), _square(self.C, T * d_in)
        return Preconditioner.of(P_K, P_C, self, self._scales(scales, balanced=balanced))

    def _scales(
        self, known: Sequence[Array] | None = None, *, balanced: bool
    ) -> Sequence[Array | None]:
        if not balanced:
            return None, None
        if known is not None:
            return known
        scales = [balance(L.row_norms()) for L in (self.K, self.C)]
        return scales if self.levels is None else products(scales, self.levels.scales())

    def refresh(
        self,
        curvature: Curvature,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
    ) -> Self:
        """One step of K and C (docs/mathematics.md, section 3).

        A `report` is told β₁ ‖m‖_F of both, before the bound, as "K_step" and "C_step".
        """
        if 0 in (self.K.shape[-1], self.C.shape[-1]):
            return self  # of a weight without numbers
        old, curvature = self.averages.read(curvature)
        rates = old.rates(curvature.t_U, curvature.t_G, lr_cov, s)
        m = self.directions(curvature, rates, s)
        if report is not None:
            report |= {
                f"{name}_step": rates.beta * own.norm() for name, own in zip("KC", m, strict=True)
            }
        betas = [step_size(own, rates.beta, s) for own in m]
        return self.moved(m, betas, rates, s)

    def grams(self, curvature: Curvature) -> tuple[Structure, Structure]:
        """Π̂(KᵀK) and Π̂(CᵀC), in the dtypes of the curvature."""
        return (
            self.K.astype(curvature.H_K.like).gram(),
            self.C.astype(curvature.H_C.like).gram(),
        )

    def directions(
        self, curvature: Curvature, rates: Rates, s: Settings
    ) -> tuple[Structure, Structure]:
        """The directions in which K and C step, m of both."""
        grams = self.grams(curvature)
        traces = None
        if not s.kfac_like:
            of = curvature.H_K, curvature.H_C, *grams
            traces = [number(S.trace()) / S.shape[-1] for S in of]
        (h_K, lambda_K), (h_C, lambda_C) = weights(rates, traces, s)
        m_K = direction(self.m_K, curvature.H_K, grams[0], h_K, lambda_K, s)
        return m_K, direction(self.m_C, curvature.H_C, grams[1], h_C, lambda_C, s)

    def moved(
        self, m: Sequence[Structure], betas: Sequence[Scalar], rates: Rates, s: Settings
    ) -> Self:
        """The factors one step later, in these directions and by these step sizes."""
        K, C = (
            stepped(L, own, start, -1.0 * start * beta, s)
            for L, own, start, beta in zip((self.K, self.C), m, rates.start, betas, strict=True)
        )
        m_K, m_C = (stored(new, old) for new, old in zip(m, (self.m_K, self.m_C), strict=True))
        averages = self.averages.written(rates.averages)
        return type(self)(K, C, m_K, m_C, averages, self.levels)

    def norms(self) -> dict[str, Array]:
        """The Frobenius norms of the factors."""
        return {"K_norm": self.K.norm(), "C_norm": self.C.norm()}


def _square(L: Structure, columns: int) -> Structure | None:
    """L Lᵀ, if it will be multiplied with so many columns that it is worth having."""
    return L.square() if columns > L.shape[-1] else None  # d³, and d² a column; 2 d² with L and Lᵀ


def weights(
    rates: Rates, traces: Sequence[Scalar] | None, s: Settings
) -> list[tuple[Scalar, Scalar]]:
    """½ h c² and ½ λ c² of K, and of C, by which m weighs the curvature and the Gram matrix.

    Here c is the scale of the start: scaling a factor by c multiplies what was measured with it,
    and its Gram matrix, by c². The adaptive curvature h is 1 for IKFAC, whose damping is λ itself.

    Args:
        rates: The numbers of the refresh.
        traces: The mean diagonals of H_K, H_C, KᵀK and CᵀC; None for IKFAC, which needs none.
        s: The settings.
    """
    of_K, of_C = (half(s) * (start * start) for start in rates.start)
    if traces is None:
        return [(of_K, of_K * rates.damping[0]), (of_C, of_C * rates.damping[1])]
    lambda_K, lambda_C = rates.damping
    if s.relative_damping:
        lambda_K = lambda_C = s.damping * rates.averages.t_U * rates.averages.t_G
    s_K, s_C = (start * start for start in rates.start)
    h_C, h_K, from_C, from_K = traces
    return [
        (of_K * (s_C * h_K), of_K * (lambda_K * s_C * from_K)),
        (of_C * (s_K * h_C), of_C * (lambda_C * s_K * from_C)),
    ]


def direction(
    m_K: Structure | None,
    H_K: Structure,
    KtK: Structure,
    of_H: Scalar,
    of_gram: Scalar,
    s: Settings,
) -> Structure:
    """M ← α₁ m + ½ (h H_K + λ Π̂(KᵀK) − I), in the dtype of H_K.

    Args:
        m_K: m, or None.
        H_K: Π̂(Kᵀ U K).
        KtK: Π̂(Kᵀ K).
        of_H: ½ h, with the adaptive curvature h (1 for IKFAC).
        of_gram: ½ λ, with the adaptive damping (λ for IKFAC).
        s: The settings.
    """
    m = H_K.scale(of_H).add_scaled(of_gram, KtK).shifted(-half(s))
    return m if m_K is None or s.kfac_like else m.add_scaled(s.alpha1, m_K.astype(m.like))


def half(s: Settings) -> Scalar:
    """The ½ in front of the bracket of m, or ½ (1 − α₁) with the authors' normalization."""
    return 0.5 * (1.0 - s.alpha1) if s.normalize_lr_cov and not s.kfac_like else 0.5


def step_size(m: Structure, beta: Scalar, s: Settings) -> Scalar:
    """β₁ of one factor, normalized or bounded as the settings ask for."""
    if s.normalize_lr_cov:
        beta = beta / at_least(number(m.max_abs()), 1.0)
    return bounded(beta, number(m.norm()), s) if is_bound(s.factor_bound) else beta


def bounded(beta: Scalar, norm: Scalar, s: Settings) -> Scalar:
    """β₁ with β₁ ‖m‖ within the bound; ‖m‖ may overflow or be zero."""
    return at_most(s.factor_bound / at_least(norm, TINY), beta)


def stepped(K: Structure, m: Structure, start: Scalar, step: Scalar, s: Settings) -> Structure:
    """K ← c K Expm(−β₁ m), in the dtype of K.

    Args:
        K: The factor.
        m: Its direction.
        start: c, the scale of the start: 1 from the second refresh on.
        step: −c β₁.
        s: The settings.
    """
    wide, by = K.astype(m.like), m.scale(step)  # first, since a product with m may overflow
    term = wide.matmul(by)  # torch.compile cannot trace `@`
    K_new = term.add_scaled(start, wide)
    for j in range(2, s.order + 1):
        term = term.matmul(by)
        K_new = K_new.add_scaled(start ** (1 - j) / math.factorial(j), term)
    return K_new.astype(K.like)


def stored(m: Structure, like: Structure | None) -> Structure | None:
    """A direction in the dtype of the momentum that is kept, None if none is."""
    return None if like is None else m.astype(like.like)
