"""The inverse-free update of matrices that show no rows: Shampoo without roots and inverses."""

from __future__ import annotations

import dataclasses
from typing import Self

from singd_core._array import Array, Scalar, cast, ranged, sum_of_squares
from singd_core._scalars import at_least, number, where
from singd_core._settings import Rate, Settings
from singd_core._tree import tree
from singd_core.curvature import TINY, Averages, Curvature, Rates
from singd_core.rounding import Rounding
from singd_core.rules.centering import InputMean, InputSums
from singd_core.rules.factor_step import half, stepped
from singd_core.rules.inverse_free import InverseFree
from singd_core.structures.base import Structure


@tree
class Shampoo(InverseFree):
    """The factors of one matrix, learned from its gradient G alone.

    Up to a number, K Kᵀ ⊗ C Cᵀ approximates (E[g gᵀ] + λ I)⁻¹ of the gradient's entries g, in the
    sense of the Kullback-Leibler divergence (Lin et al., arXiv 2402.03496). The number is taken
    out: ‖K‖² = d_in and ‖C‖² = d_out, so that G → c G changes nothing.
    `averages` has the mean square of G as t_G, and 0 as t_U, which is not known.

    Attributes:
        inputs: The mean of the inputs, if the weight has a bias: K and C are of gradients of inputs
            without it. None without a bias.
    """

    inputs: InputMean | None = None

    has_rows = False

    def with_bias(self) -> Self:
        """The factors of a weight that has a bias, before the first refresh."""
        *batch, d_in = self.K.shape[:-1]
        return dataclasses.replace(self, inputs=InputMean.zeros(batch, d_in, self.C.like))

    def learned(
        self,
        gradient: Array,
        of_bias: Array | None,
        lr_cov: Rate,
        s: Settings,
        report: dict[str, Array] | None = None,
        rounding: Rounding | None = None,
    ) -> Self:
        """One refresh with a gradient, shape (..., d_out, d_in).

        `of_bias` is the gradient of its bias, shape (..., d_out, 1), None without.
        """
        inputs = self.inputs
        if inputs is not None and of_bias is not None:
            sums = InputSums.of(gradient, of_bias, inputs.mean)
            inputs = inputs.told(sums, self.averages.k, lr_cov)
            gradient = inputs.centered(gradient, of_bias)
        told = dataclasses.replace(self, inputs=inputs)
        return told.refresh(told.curvature(gradient), lr_cov, s, report, rounding)

    def curvature(self, gradient: Array) -> Curvature:
        """What a refresh wants of a gradient, shape (..., d_out, d_in).

        In the place of t_U stands the mean square of X, the mean diagonal of H_K and of H_C.
        """
        d_out, d_in = gradient.shape[-2:]
        X, H_K, H_C = self.products(gradient)
        h, t = (sum_of_squares(x, 2) * (1.0 / (d_out * d_in)) for x in (X, gradient))
        return Curvature(H_K.scale(1.0 / d_out), H_C.scale(1.0 / d_in), h, t)

    def products(self, gradient: Array) -> tuple[Array, Structure, Structure]:
        """X = Cᵀ G K of a gradient G, with Π̂(Xᵀ X) and Π̂(X Xᵀ).

        The d_out rows of K are Cᵀ G, and the d_in rows of C are (G K)ᵀ.
        """
        K, C = (L.astype(ranged(L.like[..., :0])) for L in (self.K, self.C))
        X = C.apply_t(cast(K.apply_t(cast(gradient.mT, K.like)).mT, C.like))
        return X, K.outer(cast(X.mT, K.like)), C.outer(X)

    def weights(
        self,
        curvature: Curvature,
        grams: tuple[Structure, Structure],
        rates: Rates,
        s: Settings,
    ) -> list[tuple[Scalar, Scalar]]:
        """½ / h and ½ λ / h, with h the mean diagonal of M = H + λ Π̂(KᵀK): m is ½ (M / h − I)."""
        damping = s.damping * curvature.t_G if s.relative_damping else s.damping
        mean = at_least(curvature.t_U + damping, TINY)
        of_H = [half(m, s) / mean for m in (self.m_K, self.m_C)]
        return [(own, own * damping) for own in of_H]

    def side_moved(
        self, L: Structure, m: Structure, start: Scalar, beta: Scalar, s: Settings
    ) -> Structure:
        """L Expm(−β₁ m), divided by its root mean square over the rows; L itself if β₁ is 0."""
        moves, L = beta > 0.0, stepped(L, m, 1.0, -1.0 * beta, s)
        size = at_least(number(L.row_size()), TINY) ** -1.0
        return L.scale(where(moves, size, 1.0))

    def known(self, averages: Averages) -> Averages:
        """Without a new mean diagonal of U: the mean square of X stands in its place."""
        return dataclasses.replace(averages, t_U=self.averages.t_U)
