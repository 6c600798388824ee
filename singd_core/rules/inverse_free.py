"""The inverse-free update of the factors: SINGD, INGD and IKFAC."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

from singd_core._array import Array, Scalar, namespace
from singd_core._scalars import number
from singd_core._settings import Rate, Settings, is_bound, is_zero
from singd_core._tree import tree
from singd_core.curvature import Averages, Curvature, Measured, Rates, measure, seen
from singd_core.levels import Levels
from singd_core.preconditioner import Preconditioner
from singd_core.rounding import Rounding
from singd_core.rules.base import Rule, kept
from singd_core.rules.factor_step import (
    direction,
    half,
    in_range,
    shrunk,
    step_size,
    stepped,
    stored,
)
from singd_core.structures.base import Structure
from singd_core.structures.diagonal import Diagonal


@tree
class InverseFree(Rule):
    """The factors of one layer's inverse curvature: K Kᵀ ≈ (U + λ_K I)⁻¹, C Cᵀ ≈ (G + λ_C I)⁻¹.

    Attributes:
        K: Side d_in.
        C: Side d_out.
        m_K: The Riemannian momentum of K, None without.
        m_C: The Riemannian momentum of C.
    """

    K: Structure
    C: Structure
    m_K: Structure | None
    m_C: Structure | None
    averages: Averages
    levels: Levels | None = None

    title = "SINGD"
    without_rows = True

    @classmethod
    def start(
        cls, K: Structure, C: Structure, averages: Averages, levels: Levels | None, momentum: bool
    ) -> Self:
        """The identity."""
        if not momentum:
            return cls(K, C, None, None, averages, levels)
        m_K, m_C = (L.map(namespace(L.like).zeros_like) for L in (K, C))
        return cls(K, C, m_K, m_C, averages, levels)

    @property
    def sides(self) -> tuple[Structure, Structure]:
        """K and C."""
        return self.K, self.C

    @property
    def row_norms(self) -> tuple[Array, Array]:
        """The norms of the rows of K and of C."""
        return self.K.row_norms(), self.C.row_norms()

    def measure(self, A: Array, B: Array) -> tuple[Measured, Measured]:
        """Π̂(KᵀAᵀA K) and Π̂(CᵀBᵀB C) of rows A, shape (..., n, d_in), and B, (..., n, d_out)."""
        return measure(self.K, A), measure(self.C, B)

    def seen(self, inputs: Measured, outputs: Measured) -> tuple[Measured, Measured]:
        """The sums with K and C, from the sums with K = C = I."""
        return seen(self.K, inputs), seen(self.C, outputs)

    def measuring(self) -> Self:
        """What `measure` needs; the rest is None."""
        return type(self)(self.K, self.C, None, None, None)  # type: ignore[arg-type]

    def preconditioner(
        self, T: int, *, balanced: bool = False, scales: Sequence[Array] | None = None
    ) -> Preconditioner:
        """C Cᵀ ∇W K Kᵀ, with K Kᵀ and C Cᵀ formed once where that multiplies less."""
        d_in, d_out = self.K.shape[-1], self.C.shape[-1]
        both = self.K.square_for(T, d_out), self.C.square_for(T, d_in)
        return Preconditioner.of(both, self.sides, self.scales(scales, balanced=balanced))

    def refresh(
        self,
        curvature: Curvature,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
        rounding: Rounding | None = None,
    ) -> Self:
        """One step of K and C (docs/mathematics.md, section 3).

        A `report` is told β₁ ‖m‖_F of both, before the bound, as "K_step" and "C_step".
        """
        if 0 in (self.K.shape[-1], self.C.shape[-1]):
            return self  # of a weight without numbers
        old, curvature = self.averages.read(curvature)
        rates = old.rates(curvature.t_U, curvature.t_G, lr_cov, s)
        m = self.directions(curvature, rates, s)
        bound = is_bound(s.factor_bound)
        if bound:
            m = m[0].map(in_range), m[1].map(in_range)
        asked = report is not None or bound
        norms = [number(own.norm()) if asked else None for own in m]
        steps = [rates.beta * norm if asked else None for norm in norms]
        if report is not None:
            report |= {f"{name}_step": step for name, step in zip("KC", steps, strict=True)}
        pairs = zip(m, norms, strict=True)
        betas = [step_size(own, norm, rates.beta, s) for own, norm in pairs]
        momenta = m
        if bound:
            of_K, of_C = (shrunk(step) for step in steps)
            rates = rates._replace(start=(rates.start[0] * of_K, rates.start[1] * of_C))
            if self.m_K is not None:
                momenta = m[0].scale(of_K * of_K), m[1].scale(of_C * of_C)
        return self.moved(m, betas, rates, momenta, s, rounding)

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
        of_both = self.weights(curvature, grams, rates, s)
        sides = zip((self.m_K, self.m_C), (curvature.H_K, curvature.H_C), grams, strict=True)
        m_K, m_C = (
            direction(*own, *weights, s) for own, weights in zip(sides, of_both, strict=True)
        )
        return m_K, m_C

    @abstractmethod
    def weights(
        self,
        curvature: Curvature,
        grams: tuple[Structure, Structure],
        rates: Rates,
        s: Settings,
    ) -> list[tuple[Scalar, Scalar]]:
        """By which m weighs the curvature and the Gram matrix, of K and of C."""

    def moved(
        self,
        m: Sequence[Structure],
        betas: Sequence[Scalar],
        rates: Rates,
        momenta: Sequence[Structure],
        s: Settings,
        rounding: Rounding | None = None,
    ) -> Self:
        """The factors one step later, in these directions and by these step sizes.

        Of `momenta` are those that are kept.
        """
        sides = zip("KC", self.sides, m, rates.start, betas, strict=True)
        K, C = (
            kept(self.side_moved(L, own, start, beta, s), L, name, rounding)
            for name, L, own, start, beta in sides
        )
        pairs = zip(momenta, (self.m_K, self.m_C), strict=True)
        m_K, m_C = (stored(new, old) for new, old in pairs)
        averages = self.averages.written(self.known(rates.averages))
        return dataclasses.replace(self, K=K, C=C, m_K=m_K, m_C=m_C, averages=averages)

    def side_moved(
        self, L: Structure, m: Structure, start: Scalar, beta: Scalar, s: Settings
    ) -> Structure:
        """K or C one step later: c L Expm(−β₁ m), with c the scale of the start."""
        return stepped(L, m, start, -1.0 * start * beta, s)

    def known(self, averages: Averages) -> Averages:
        """What is known of the new averages."""
        return averages

    def norms(self) -> dict[str, Array]:
        """The Frobenius norms of the factors."""
        return {"K_norm": self.K.norm(), "C_norm": self.C.norm()}


@tree
class IKFAC(InverseFree):
    """The IKFAC form: no Riemannian momentum, and 1 in place of the adaptive curvature."""

    @classmethod
    def wants_rows(cls, structures: Sequence[type[Structure]]) -> bool:
        """Unless both are diagonal: docs/rows.md says why. Rules that derive from it want rows."""
        return cls is not IKFAC or not all(issubclass(S, Diagonal) for S in structures)

    def weights(
        self,
        curvature: Curvature,
        grams: tuple[Structure, Structure],
        rates: Rates,
        s: Settings,
    ) -> list[tuple[Scalar, Scalar]]:
        """½ h c² and ½ λ c² of K, and of C, by which m weighs the curvature and the Gram matrix.

        Here c is the scale of the start: scaling a factor by c multiplies what was measured with
        it, and its Gram matrix, by c².
        """
        of_H = [0.5 * (start * start) for start in rates.start]
        return [(own, own * damping) for own, damping in zip(of_H, rates.damping, strict=True)]


@tree
class SINGD(IKFAC):
    """SINGD, and INGD with dense factors: the other side's curvature weighs a factor's own."""

    @classmethod
    def keeps_momentum(cls, s: Settings) -> bool:
        """Unless α₁ is a number that is 0."""
        return not is_zero(s.alpha1)

    def weights(
        self,
        curvature: Curvature,
        grams: tuple[Structure, Structure],
        rates: Rates,
        s: Settings,
    ) -> list[tuple[Scalar, Scalar]]:
        """With the adaptive curvature, the mean diagonal of the other side's."""
        of = curvature.H_K, curvature.H_C, *grams
        h_C, h_K, from_C, from_K = (number(S.trace()) / S.shape[-1] for S in of)
        s_K, s_C = (start * start for start in rates.start)
        of_K, of_C = (half(self.m_K, s) * own for own in (s_K, s_C))
        lambda_K, lambda_C = rates.damping
        if s.relative_damping:
            lambda_K = lambda_C = s.damping * rates.averages.t_U * rates.averages.t_G
        return [
            (of_K * (s_C * h_K), of_K * (lambda_K * s_C * from_K)),
            (of_C * (s_K * h_C), of_C * (lambda_C * s_K * from_C)),
        ]
