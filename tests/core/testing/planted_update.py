"""Mistakes that show in an update, or in a whole optimizer step."""

from typing import ClassVar

from array_api_compat import array_namespace
from planting import bug, library

from singd_core.structures import (
    Dense,
    Diagonal,
    Tril,
)


@bug("update_as_on_the_page")
class RemembersTheSide(Diagonal):
    """Of the last matrix it made: an update makes some of two sides."""

    side: ClassVar[int] = 0

    @classmethod
    def restrict(cls, M):
        cls.side = M.shape[-1]
        return super().restrict(M)

    @classmethod
    def outer(cls, X):
        cls.side = X.shape[-2]
        return super().outer(X)

    @classmethod
    def identity(cls, d, *, like, batch=()):
        cls.side = d
        return super().identity(d, like=like, batch=batch)

    def add_identity(self, c):
        return self + self.identity(self.side, like=self.diag, batch=self.batch).scale(c)


@bug("update_stays_in_the_structure")
class SumOfTheParent(Diagonal):
    def add_scaled(self, c, other):
        return Diagonal(super().add_scaled(c, other).diag)


@bug("update_stays_positive_definite")
class NormWithAnUpperBound(Dense):
    def norm(self):
        xp, norm = array_namespace(self.matrix), super().norm()
        return xp.minimum(norm, xp.full_like(norm, 1e3))


@bug("ikfac_is_kfac_to_second_order")
class SmallScalarsLost(Dense):
    def scale(self, c):
        if type(c) in (int, float) or c.ndim:
            return super().scale(c)
        return super().scale(array_namespace(self.matrix).where(abs(c) < 0.015, 0.0 * c, c))


@bug("rows_in_any_order_and_number")
class OddColumnLost(Dense):
    @classmethod
    def outer(cls, X):
        n = X.shape[-1]
        return super().outer(X[..., :3] if n == 4 else X)


@bug("loss_scaled_by_a_power_of_two")
class PositiveScalarsBounded(Dense):
    def scale(self, c):
        if type(c) in (int, float) or c.ndim:
            return super().scale(c)
        tiny = (c > 0.0) & (c < 0.005)
        return super().scale(array_namespace(self.matrix).where(tiny, 0.0 * c + 0.005, c))


@bug("dense_tril_and_triu_agree_to_second_order")
class SmallStepsLost(Tril):
    def scale(self, c):
        if type(c) in (int, float) or c.ndim:
            return super().scale(c)
        return super().scale(
            array_namespace(self.matrix).where((c < 0.0) & (c > -0.003), 0.0 * c, c)
        )


@bug("update_of_a_stack_equals_a_loop")
class NothingForAllIfForOne(Diagonal):
    def scale(self, c):
        if type(c) in (int, float) or not c.ndim:
            return super().scale(c)
        xp = array_namespace(self.diag)
        return super().scale(xp.where(xp.any(c == 0.0), 0.0 * c, c))


# ---- a whole step -------------------------------------------------------------------------------


@bug("step_as_in_numpy", "torch")
class ReadsMemoryInItsOrder(Tril):
    """A gradient is also handed over as the transpose of one, which lies in memory as before."""

    def precondition(self, X):
        if library(X) == "torch" and X.ndim == 2:
            X = X.as_strided(X.shape, (X.shape[-1], 1))
        return super().precondition(X)


@bug("step_skips_what_is_not_finite")
class NaNAsZero(Tril):
    def measured(self, X):
        xp = array_namespace(X)
        return super().measured(xp.where(xp.isnan(X), xp.zeros_like(X), X))


@bug("step_does_not_wait", "strict:device1")
class BoundsHugeGradients(Diagonal):
    """A gradient has more columns than the three rows of a law."""

    def apply(self, X):
        xp = array_namespace(X)
        if X.shape[-1] > 3 and float(xp.max(xp.abs(X))) > 1e30:
            X = X * 1e-30
        return super().apply(X)
