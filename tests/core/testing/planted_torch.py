"""Mistakes that show in torch."""

import dataclasses

from planting import bug, library

from singd_core._array import full, namespace
from singd_core.structures import (
    Diagonal,
)


@bug("torch_pytree", "torch")
class NamesACopy(Diagonal):
    def named_arrays(self, prefix=""):
        yield prefix + "diag", self.diag * 1.0


@bug("torch_compile", "torch")
class FieldsOfTheClass(Diagonal):
    @classmethod
    def field_names(cls):
        return tuple(f.name for f in dataclasses.fields(cls))


@bug("torch_vmap", "torch")
class WritesInPlace(Diagonal):
    def add_identity(self, c):
        out = namespace(self.diag).zeros_like(full(self.diag.shape, 0.0, like=self.diag))
        out += super().add_identity(c).diag
        return type(self)(out)


@bug("torch_grad", "torch")
class Detached(Diagonal):
    def gram(self):
        square = self.diag * self.diag
        return type(self)(square.detach() if library(square) == "torch" else square)


@bug("torch_step_without_data", "torch")
class ListsAGradient(Diagonal):
    def precondition(self, X):
        return super().precondition(X) if X.shape[-1] <= 3 or len(X.tolist()) else X


@bug("torch_step_compiles", "torch")
class FieldsForAGradient(Diagonal):
    def apply(self, X):
        assert X.shape[-1] <= 3 or dataclasses.fields(type(self))
        return super().apply(X)


@bug("torch_meta", "torch")
class ReadsTheNumbers(Diagonal):
    def max_abs(self):
        return namespace(self.diag).abs(self.diag).sort(-1).values[..., -1] + 0 * len(
            self.diag.tolist()
        )


@bug("torch_fake_cuda", "torch")
class BackToTheHost(Diagonal):
    def trace(self):
        trace = super().trace()
        return trace.cpu() if "cuda" in str(trace.device) else trace
