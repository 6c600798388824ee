"""Structures with one mistake each, and the law that a person would expect to be named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from singd_core._array import eye, full, namespace, sum_of_squares, widen
from singd_core.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Structure,
    Tril,
    TrilToeplitz,
    blockdiagonal,
    hierarchical,
    structure,
)


class Bug(NamedTuple):
    """A structure, the law expected, and the array libraries in which it shows."""

    structure: type[Structure]
    law: str
    backends: tuple[str, ...]


BUGS: list[Bug] = []


def bug(law: str, *backends: str) -> Callable[[type[Structure]], type[Structure]]:
    def add(cls: type[Structure]) -> type[Structure]:
        BUGS.append(Bug(cls, law, backends or ("numpy",)))
        return cls

    return add


def library(x: Any) -> str:
    return type(x).__module__.split(".")[0]


Blocks: Any = blockdiagonal(2)
Hierarchical: Any = hierarchical(2, 2)


# ---- the linear space ---------------------------------------------------------------------------


@bug("restriction_is_a_retraction")
class Doubled(Diagonal):
    @classmethod
    def restrict(cls, M):
        return cls(2.0 * namespace(M).linalg.diagonal(M))


@bug("restriction_is_linear")
class AbsoluteValues(Diagonal):
    @classmethod
    def restrict(cls, M):
        return cls(namespace(M).abs(namespace(M).linalg.diagonal(M)))


@bug("restriction_as_in_numpy", "numpy", "torch")
class OtherInTorch(Diagonal):
    @classmethod
    def restrict(cls, M):
        xp, diag = namespace(M), namespace(M).linalg.diagonal(M)
        if library(M) == "torch" and M.shape[-1] > 1:
            next_to_it = xp.linalg.diagonal(M, offset=1)
            diag = diag + xp.concat([next_to_it, xp.zeros_like(diag[..., :1])], axis=-1)
        return cls(diag)


@bug("shape")
class ShapeWithoutBatch(Diagonal):
    @property
    def shape(self):
        return (self.diag.shape[-1],) * 2


@bug("identity")
class StrictlyLower(Tril):
    @classmethod
    def restrict(cls, M):
        return cls(namespace(M).tril(M, k=-1))


@bug("identity")
class IdentityOfOnes(TrilToeplitz):
    @classmethod
    def identity(cls, d, *, like, batch=()):
        return cls(full((*batch, d), 1.0, like=like))


@bug("sums")
class SumWithoutRemainder(Blocks):
    made_by = None

    def __add__(self, other):
        return type(self)(self.blocks + other.blocks, self.last)


@bug("sums")
class DifferenceTheOtherWay(Diagonal):
    def __sub__(self, other):
        return type(self)(other.diag - self.diag)


@bug("scalar_multiples")
class ScalesOneArray(Blocks):
    made_by = None

    def scale(self, c):
        return type(self)(self.blocks * c, self.last)


@bug("zero")
class ZeroIsFalse(Diagonal):
    def scale(self, c):
        return super().scale(1.0 if isinstance(c, float) and not c else c)


@bug("add_identity")
class AddsToEveryEntry(Tril):
    def add_identity(self, c):
        return self.map(lambda a: a + (c if isinstance(c, float) else c[..., None, None]))


@bug("closed_under_product")
@structure
class Banded(Structure):
    """Tridiagonal matrices."""

    matrix: Any

    @classmethod
    def restrict(cls, M):
        xp = namespace(M)
        return cls(xp.tril(xp.triu(M, k=-1), k=1))

    def dense(self):
        return self.matrix


@bug("product")
class ProductTheOtherWay(Tril):
    def matmul(self, other):
        return type(self)(other.matrix @ self.matrix)


@bug("product")
class BlocksMixedUp(Hierarchical):
    made_by = None

    def matmul(self, other):
        new = super().matmul(other)
        return type(self)(new.A, self.A.apply(other.B) + self.B, new.D)


@bug("associative")
class GarbageAboveTheDiagonal(Tril):
    def dense(self):
        return namespace(self.matrix).tril(self.matrix)

    def matmul(self, other):
        product = self.dense() @ other.dense()
        return type(self)(product + product.mT - namespace(product).tril(product.mT))

    def apply(self, X):
        return self.matrix @ X


# ---- products, projection, sums -----------------------------------------------------------------


@bug("apply")
class RemainderDropped(Blocks):
    made_by = None

    def apply(self, X):
        return namespace(X).concat([super().apply(X)[..., : X.shape[-2] // 2 * 2, :]], axis=-2)

    def dense(self):
        return BlockDiagonal.apply(self, eye(self.shape[-1], like=self.last, batch=self.batch))


@bug("apply")
class LastBlockNotApplied(Blocks):
    made_by = None

    def apply(self, X):
        blocks, last = self._split(X)
        return self._join(self.blocks @ blocks, last)

    def dense(self):
        return BlockDiagonal.apply(self, eye(self.shape[-1], like=self.last, batch=self.batch))


@bug("apply_t")
class NotTransposed(Tril):
    def apply_t(self, X):
        return self.apply(X)

    def congruence(self, X):
        return self.outer(self.matrix.mT @ X)

    def precondition(self, X):
        return self.matrix @ (self.matrix.mT @ X)


@bug("precondition")
class TransposeFirst(Tril):
    def precondition(self, X):
        return self.apply_t(self.apply(X))


@bug("projection")
class WithoutTheTwo(Tril):
    @classmethod
    def project(cls, M):
        return cls.restrict(M)


@bug("projection")
class TwoOnTheDiagonal(Tril):
    @classmethod
    def project(cls, M):
        return cls(2.0 * namespace(M).tril(M))


@bug("projection")
@structure
class FirstColumn(Structure):
    """Toeplitz by its first column, not an orthogonal projection, with the inherited Π̂."""

    entries: Any

    @classmethod
    def restrict(cls, M):
        return cls(M[..., 0])

    def dense(self):
        return TrilToeplitz(self.entries).dense()


@bug("projection")
class SumsForMeans(TrilToeplitz):
    @classmethod
    def _from_sums(cls, sums, like):
        return cls(namespace(sums).astype(sums, like.dtype))


@bug("projection_is_a_member")
class WholeMatrix(Tril):
    @classmethod
    def project(cls, M):
        return cls(M)


@bug("projection_as_in_numpy", "numpy", "torch")
class AntisymmetricInTorch(Dense):
    @classmethod
    def project(cls, M):
        xp = namespace(M)
        return cls(M + (xp.triu(M) - xp.tril(M) if library(M) == "torch" else 0.0))


@bug("outer")
class MeanOverColumns(Diagonal):
    @classmethod
    def outer(cls, X):
        return cls(sum_of_squares(X, 1) * (1.0 / max(X.shape[-1], 1)))

    def congruence(self, X):
        return Diagonal(self.diag).congruence(X)


@bug("congruence")
class CongruenceTheOtherWay(Tril):
    def congruence(self, X):
        return self.outer(self.apply(X))


@bug("congruence")
class WrongForManyColumns(Dense):
    def congruence(self, X):
        if X.shape[-1] <= 2 * X.shape[-2]:
            return super().congruence(X)
        return self.project(self.matrix @ (X @ X.mT) @ self.matrix)


@bug("gram")
class GramTheOtherWay(Tril):
    def gram(self):
        return self.project(self.matrix @ self.matrix.mT)


@bug("gram")
class GramWithoutOffDiagonalBlock(Hierarchical):
    made_by = None

    def gram(self):
        new = super().gram()
        return type(self)(new.A, new.B, self.D.gram())


@bug("no_columns")
class NormalizesColumns(Diagonal):
    @classmethod
    def outer(cls, X):
        largest = namespace(X).max(namespace(X).abs(X), axis=(-2, -1), keepdims=True)
        largest = largest + namespace(X).astype(largest == 0.0, X.dtype)
        return cls(super().outer(X / largest).diag * (largest * largest)[..., 0])


@bug("trace")
class SumOfAllEntries(Tril):
    def trace(self):
        return namespace(self.matrix).sum(widen(self.matrix), axis=(-2, -1))


@bug("norm")
class NormOfTheStored(TrilToeplitz):
    def norm(self):
        return namespace(self.entries).sqrt(sum_of_squares(self.entries, 1))


@bug("norm")
class NormSquared(Diagonal):
    def norm(self):
        return sum_of_squares(self.diag, 1)


@bug("max_abs")
class LargestWithoutAbs(Diagonal):
    def max_abs(self):
        return namespace(self.diag).max(self.diag, axis=-1)


@bug("sums_are_wide")
class NormInHalf(Diagonal):
    def norm(self):
        xp = namespace(self.diag)
        return widen(xp.sqrt(xp.sum(self.diag * self.diag, axis=-1, dtype=self.diag.dtype)))


# ---- arrays -------------------------------------------------------------------------------------


@bug("declared")
class Undecorated(Structure):
    diag: Any

    def __init__(self, diag):
        self.diag = diag

    @classmethod
    def restrict(cls, M):
        return cls(namespace(M).linalg.diagonal(M))

    def dense(self):
        return self.diag[..., None] * eye(self.diag.shape[-1], like=self.diag)


@bug("dtype_of_the_leaf")
class ScalarLeaks(Diagonal):
    def scale(self, c):
        plain = type(c) in (int, float) or c.ndim == 0
        return type(self)(self.diag * (c if plain else c[..., None]))


@bug("dtype_of_the_leaf")
class WidensForGood(Diagonal):
    @classmethod
    def outer(cls, X):
        return cls(sum_of_squares(X, 1))


@bug("device_of_the_leaf", "numpy", "strict:device1")
class IdentityOnDefaultDevice(Diagonal):
    @classmethod
    def identity(cls, d, *, like, batch=()):
        return cls(namespace(like).ones((*batch, d), dtype=like.dtype))


@bug("no_waiting_for_the_device", "numpy", "strict:device1")
class HiddenFloat(Diagonal):
    def scale(self, c):
        return super().scale(c if getattr(c, "ndim", 0) else float(c))


@bug("no_waiting_for_the_device", "numpy", "strict:device1")
class BranchesOnData(Diagonal):
    def norm(self):
        if self.diag.ndim == 1 and not namespace(self.diag).any(self.diag != 0.0):
            return widen(self.diag[0])
        return super().norm()


@bug("nothing_is_changed")
class ScalesInPlace(Tril):
    def scale(self, c):
        matrix = self.matrix
        matrix *= c if isinstance(c, float) else c[..., None, None]
        return self


@bug("numbers_as_declared")
class RemainderNotCounted(Blocks):
    made_by = None

    @classmethod
    def numbers(cls, d):
        return d // 2 * 4


@bug("no_dense_intermediate")
class AppliesDense(Diagonal):
    def apply(self, X):
        return self.dense() @ X


@bug("no_dense_intermediate")
class OuterThroughTheProduct(Blocks):
    made_by = None

    @classmethod
    def outer(cls, X):
        return cls.restrict(X @ X.mT)


@bug("batch_axes_equal_a_loop")
class SumsOverTheBatch(Diagonal):
    def trace(self):
        return namespace(self.diag).sum(widen(self.diag))


@bug("batch_axes_equal_a_loop")
class FirstOfTheBatch(Tril):
    def apply(self, X):
        return self.matrix.reshape(-1, *self.shape[-2:])[0] @ X


@bug("batch_axes_equal_a_loop")
class ScalarAlongTheLastAxis(Diagonal):
    def scale(self, c):
        if isinstance(c, np.ndarray) and c.ndim and c.shape[-1] == self.diag.shape[-1]:
            return type(self)(self.diag * c)
        return super().scale(c)


@bug("state_round_trip")
class OneNameForTwo(Blocks):
    made_by = None

    def named_arrays(self, prefix=""):
        yield prefix + "blocks", self.blocks
        yield prefix + "blocks", self.last


@bug("numbers_as_declared")
class IdentityOfAnotherShape(Diagonal):
    @classmethod
    def identity(cls, d, *, like, batch=()):
        return cls(full((*batch, 1), 1.0, like=like))

    def dense(self):
        # one number stands for all
        d = max(self.diag.shape[-1], getattr(self, "side", 0))
        return self.diag[..., None] * eye(d, like=self.diag)


def _local() -> Any:
    class Local(Diagonal):
        pass

    return Local


bug("pickle_round_trip")(_local())


# ---- the update ---------------------------------------------------------------------------------


@bug("update_as_on_the_page")
class CastsOneArray(Blocks):
    made_by = None

    def astype(self, like):
        return type(self)(self.blocks, 0.0 * self.last)


@bug("update_stays_in_the_structure")
class SumOfTheParent(Diagonal):
    def __add__(self, other):
        return Diagonal(self.diag + other.diag)


@bug("update_stays_positive_definite")
class NormWithAnUpperBound(Dense):
    def norm(self):
        xp, norm = namespace(self.matrix), super().norm()
        return xp.minimum(norm, xp.full_like(norm, 1e3))


@bug("ikfac_is_kfac_to_second_order")
class SmallScalarsLost(Dense):
    def scale(self, c):
        if type(c) in (int, float) or c.ndim:
            return super().scale(c)
        return super().scale(namespace(self.matrix).where(abs(c) < 0.015, 0.0 * c, c))


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
        return super().scale(namespace(self.matrix).where(tiny, 0.0 * c + 0.005, c))


@bug("update_does_not_wait", "strict:device1")
class ChecksWhatItCasts(Diagonal):
    def astype(self, like):
        assert not bool(namespace(self.diag).any(self.diag != self.diag)), "not a number"
        return super().astype(like)


# ---- torch --------------------------------------------------------------------------------------


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


@bug("torch_update_without_data", "torch")
class ListsWhatItCasts(Diagonal):
    def astype(self, like):
        return super().astype(like) if len(self.diag.tolist()) else self


@bug("torch_update_compiles", "torch")
class FieldsWhenCast(Diagonal):
    def astype(self, like):
        assert dataclasses.fields(type(self))
        return super().astype(like)


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


# ---- jax ----------------------------------------------------------------------------------------


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
