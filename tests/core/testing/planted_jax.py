"""Mistakes that show in jax."""

from planting import bug, library

from singd_core.structures import (
    Diagonal,
)


@bug("jax_pytree", "jax")
class OtherNames(Diagonal):
    def named_arrays(self, prefix=""):
        yield prefix + "diagonal", self.diag


@bug("jax_jit", "jax")
class ShortcutWhenTraced(Diagonal):
    def gram(self):
        return self if type(self.diag).__name__ == "DynamicJaxprTracer" else super().gram()


@bug("jax_eval_shape", "jax")
class BranchesInJax(Diagonal):
    def norm(self):
        return super().norm() * (1.0 if self.diag.ndim > 1 or self.diag[0] < 1e30 else 0.5)


@bug("jax_vmap", "jax")
class ShortcutWhenMapped(Diagonal):
    def gram(self):
        return self if type(self.diag).__name__ == "BatchTracer" else super().gram()


@bug("jax_scan", "jax")
class DifferenceOfTheParent(Diagonal):
    def __sub__(self, other):
        return Diagonal(self.diag - other.diag)


@bug("jax_grad", "jax")
class StopsTheGradient(Diagonal):
    def gram(self):
        if library(self.diag) == "jax" or library(self.diag) == "jaxlib":
            import jax

            return type(self)(jax.lax.stop_gradient(self.diag * self.diag))
        return super().gram()


@bug("jax_step_without_data", "jax")
class BranchesOnAGradient(Diagonal):
    def apply(self, X):
        return super().apply(X) if X.shape[-1] <= 3 or X[0, 0] < 1e30 else X


@bug("jax_step", "jax")
class NoGradientWhenTraced(Diagonal):
    def apply(self, X):
        traced = X.shape[-1] > 3 and type(X).__name__ == "DynamicJaxprTracer"
        return X if traced else super().apply(X)
