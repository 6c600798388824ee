"""Mistakes that show where factors learn from gradients alone."""

from array_api_compat import array_namespace
from planting import bug

from singd_core.structures import Dense, Tril


def _of_array(c):
    """Whether a number is one of a matrix, and not a setting."""
    return type(c) not in (int, float)


@bug("gradients_teach_as_on_the_page")
class SlightlyMoreIsOne(Dense):
    """So that a factor is not made as large as it should be."""

    def scale(self, c):
        if _of_array(c) and not c.ndim:
            c = array_namespace(self.matrix).where((c > 1.0) & (c < 1.03), 0.0 * c + 1.0, c)
        return super().scale(c)


@bug("gradients_of_any_scale")
class HugeScalarsBounded(Dense):
    """By which small gradients would be multiplied."""

    def scale(self, c):
        if _of_array(c) and not c.ndim:
            c = array_namespace(self.matrix).where(c > 1e9, 0.0 * c + 1e9, c)
        return super().scale(c)


@bug("gradients_keep_factors_regular")
class SmallRange(Dense):
    """Squares beyond it are infinite, and a number below it is taken for its smallest."""

    @classmethod
    def outer(cls, X):
        square = super().outer(X).matrix
        return cls(
            array_namespace(X).where(abs(square) > 1e27, 0.0 * square + float("inf"), square)
        )

    def scale(self, c):
        smallest = 1e-27 * (self.matrix * 0.0 + 1.0)
        c = c[..., None, None] if getattr(c, "ndim", 0) else c
        c = self.matrix * 0.0 + c
        xp = array_namespace(c)
        return type(self)(
            self.matrix * xp.where((abs(c) < 1e-27) & (c != 0.0), xp.sign(c) * smallest, c)
        )


@bug("gradients_of_a_stack_equal_a_loop")
class SmallBesideTheLargest(Dense):
    """A gradient of zeros is divided by the smallest number."""

    def scale(self, c):
        if _of_array(c) and c.ndim:
            xp = array_namespace(self.matrix)
            c = xp.where(abs(c) < 2.0**-100 * xp.max(abs(c)), 0.0 * c, c)
        return super().scale(c)


@bug("gradients_of_nan_change_nothing")
class RefusesNaN(Tril):
    """In products with more columns than the three rows of a law."""

    @classmethod
    def outer(cls, X):
        xp = array_namespace(X)
        if X.shape[-1] > 3 and bool(xp.any(xp.isnan(X))):
            raise ValueError("not a number")
        return super().outer(X)
