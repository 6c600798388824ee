"""KFAC with its inverses, the baseline that the inverse-free update replaces."""

from __future__ import annotations

from typing import Self

from singd_core._array import Array, Scalar, at_least, cast, inverse, namespace, widen
from singd_core._settings import Rate, Settings
from singd_core._tree import Tree, tree
from singd_core.curvature import TINY, Averages, Curvature, Measured, measure
from singd_core.levels import Levels
from singd_core.preconditioner import Preconditioner, Side, products
from singd_core.structures.base import Structure
from singd_core.structures.dense import Dense


@tree
class KFAC(Tree):
    """The averaged factors of one layer's curvature and their damped inverses, all dense.

    Attributes:
        S_K: Average of U, side d_in.
        S_C: Average of G, side d_out.
        P_K: (S_K + λ_K I)⁻¹.
        P_C: (S_C + λ_C I)⁻¹.
        averages: Mean diagonals of U and G so far.
        levels: How large rows and columns of natural gradients are, None where nobody asks.
    """

    S_K: Dense
    S_C: Dense
    P_K: Dense
    P_C: Dense
    averages: Averages
    levels: Levels | None = None

    @property
    def structures(self) -> tuple[type[Structure], type[Structure]]:
        """Both are dense."""
        return Dense, Dense

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """AᵀA and BᵀB of rows A, shape (..., n, d_in), and B, shape (..., n, d_out)."""
        return measure(self.S_K, A, identity=True), measure(self.S_C, B, identity=True)

    def measuring(self) -> Self:
        """What `measure` needs; the rest is None."""
        return type(self)(self.S_K, self.S_C, None, None, None)  # type: ignore[arg-type]

    def precondition(self, gradient: Array, *, balanced: bool = False) -> Array:
        """(S_C + λ_C I)⁻¹ ∇W (S_K + λ_K I)⁻¹ of a gradient, shape (..., d_out, d_in)."""
        return self.preconditioner(1, balanced=balanced)(gradient)

    def preconditioner(self, T: int, *, balanced: bool = False) -> Preconditioner:
        """`precondition`."""
        both = self.P_K, self.P_C
        scales: list[Array | None] = [_balance(P) if balanced else None for P in both]
        if balanced and self.levels is not None:
            scales = products(scales, self.levels.scales())
        return Preconditioner(*(Side.of(P, P, c) for P, c in zip(both, scales, strict=True)))

    def refresh(
        self,
        curvature: Curvature,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
    ) -> Self:
        """S ← (1 − β₁) S + β₁ U, and the inverses anew (docs/mathematics.md, section 2).

        There is nothing to `report`.
        """
        if 0 in (self.S_K.shape[-1], self.S_C.shape[-1]):
            return self  # of a weight without numbers
        old, curvature = self.averages.read(curvature)
        rates = old.rates(curvature.t_U, curvature.t_G, lr_cov, s)
        (lambda_K, lambda_C), (K_start, C_start) = rates.damping, rates.start
        S_K = average(self.S_K, curvature.H_K, rates.beta, K_start)
        S_C = average(self.S_C, curvature.H_C, rates.beta, C_start)
        P_K, P_C = damped_inverse(S_K, lambda_K), damped_inverse(S_C, lambda_C)
        averages = self.averages.written(rates.averages)
        return type(self)(S_K, S_C, P_K, P_C, averages, self.levels)

    def norms(self) -> dict[str, Array]:
        """The Frobenius norms of the factors."""
        return {"S_K_norm": self.S_K.norm(), "S_C_norm": self.S_C.norm()}


def _balance(P: Dense) -> Array:
    """D^(−½), D being the diagonal of P."""
    return at_least(widen(namespace(P.matrix).linalg.diagonal(P.matrix)), TINY) ** -0.5


def average(S: Dense, U: Structure, beta: Scalar, start: Scalar) -> Dense:
    """(1 − β₁) S + β₁ U; the first refresh of a scaled start divides S = I by start²."""
    # start is 0 where the curvature is infinite: that shows in U, and the step is skipped
    wide = S.astype(U.like).scale(1.0 / at_least(start * start, TINY))
    return wide.add_scaled(beta, Dense(U.dense()) - wide).astype(S.like)


def damped_inverse(S: Dense, damping: Scalar) -> Dense:
    """(S + λI)⁻¹, inverted in at least float32 and stored in the dtype of S."""
    damped = S.astype(widen(S.matrix)).add_identity(damping)
    return Dense(cast(inverse(damped.matrix), S.matrix))
