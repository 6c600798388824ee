"""KFAC with its inverses, the baseline that the inverse-free update replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from singd_core._array import Array, Scalar, cast, inverse, namespace, widen
from singd_core._scalars import at_least
from singd_core._settings import Rate, Settings
from singd_core._tree import tree
from singd_core.curvature import TINY, Averages, Curvature, Measured, measure
from singd_core.levels import Levels
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import Rounding
from singd_core.rules.base import Rule, kept
from singd_core.structures.base import Structure
from singd_core.structures.dense import Dense


@tree
class KFAC(Rule):
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

    title = "KFAC"
    only_dense = True

    @classmethod
    def start(
        cls, K: Structure, C: Structure, averages: Averages, levels: Levels | None, momentum: bool
    ) -> Self:
        """The identity."""
        return cls(K, C, K, C, averages, levels)  # type: ignore[arg-type]

    @property
    def sides(self) -> tuple[Structure, Structure]:
        """S_K and S_C."""
        return self.S_K, self.S_C

    @property
    def row_norms(self) -> tuple[Array, Array]:
        """The roots of the diagonals of P_K and of P_C, which rounding may make negative."""
        diagonals = (widen(namespace(P.matrix).linalg.diagonal(P.matrix)) for P in self.inverses)
        of_K, of_C = (at_least(d, TINY) ** 0.5 for d in diagonals)
        return of_K, of_C

    @property
    def inverses(self) -> tuple[Dense, Dense]:
        """P_K and P_C."""
        return self.P_K, self.P_C

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """AᵀA and BᵀB of rows A, shape (..., n, d_in), and B, shape (..., n, d_out)."""
        return measure(self.S_K, A, identity=True), measure(self.S_C, B, identity=True)

    def measuring(self) -> Self:
        """What `measure` needs; the rest is None."""
        return type(self)(self.S_K, self.S_C, None, None, None)  # type: ignore[arg-type]

    def preconditioner(
        self, T: int, *, balanced: bool = False, scales: Sequence[Array] | None = None
    ) -> Preconditioner:
        """∇W ↦ (S_C + λ_C I)⁻¹ ∇W (S_K + λ_K I)⁻¹."""
        both = self.inverses
        return Preconditioner.of(both, both, self.scales(scales, balanced=balanced))

    def refresh(
        self,
        curvature: Curvature,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
        rounding: Rounding | None = None,
    ) -> Self:
        """S ← (1 − β₁) S + β₁ U, and the inverses anew (docs/mathematics.md, section 2).

        There is nothing to `report`.
        """
        if 0 in (self.S_K.shape[-1], self.S_C.shape[-1]):
            return self  # of a weight without numbers
        old, curvature = self.averages.read(curvature)
        rates = old.rates(curvature.t_U, curvature.t_G, lr_cov, s)
        (lambda_K, lambda_C), (K_start, C_start) = rates.damping, rates.start
        new_K = average(self.S_K, curvature.H_K, rates.beta, K_start)
        new_C = average(self.S_C, curvature.H_C, rates.beta, C_start)
        S_K, S_C = kept(new_K, self.S_K, "K", rounding), kept(new_C, self.S_C, "C", rounding)
        P_K, P_C = damped_inverse(S_K, lambda_K), damped_inverse(S_C, lambda_C)
        averages = self.averages.written(rates.averages)
        return type(self)(S_K, S_C, P_K, P_C, averages, self.levels)

    def norms(self) -> dict[str, Array]:
        """The Frobenius norms of the factors."""
        return {"S_K_norm": self.S_K.norm(), "S_C_norm": self.S_C.norm()}


def average(S: Dense, U: Structure, beta: Scalar, start: Scalar) -> Dense:
    """(1 − β₁) S + β₁ U, in at least float32.

    The first refresh of a scaled start divides S = I by start².
    """
    # start is 0 where the curvature is infinite: that shows in U, and the step is skipped
    wide = S.map(widen).scale(1.0 / at_least(start * start, TINY))
    return wide.add_scaled(beta, Dense(cast(U.dense(), wide.like)) - wide)


def damped_inverse(S: Dense, damping: Scalar) -> Dense:
    """(S + λI)⁻¹, inverted in at least float32 and stored in the dtype of S.

    If there is no inverse it is not finite, and the step of the layer is skipped.
    """
    damped = S.astype(widen(S.matrix)).add_identity(damping)
    return Dense(cast(inverse(damped.matrix), S.matrix))
