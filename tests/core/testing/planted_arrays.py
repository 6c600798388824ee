"""Mistakes with arrays: dtype, device, memory, batch axes, state."""

import math
from typing import Any

import numpy as np
from planting import Blocks, bug

from singd_core._array import eye, full, namespace, sum_of_squares, widen
from singd_core.structures import (
    Diagonal,
    Structure,
    Tril,
)


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


@bug("like")
class LikeACopy(Diagonal):
    @property
    def like(self):
        return self.diag * 1.0


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


@bug("width")
class WidthOfWholeBlocks(Blocks):
    made_by = None

    @classmethod
    def width(cls, d):
        return cls.b


@bug("no_dense_intermediate")
class AppliesDense(Diagonal):
    def apply(self, X):
        return self.dense() @ X


@bug("no_dense_intermediate")
class ScalesRowsOfADense(Diagonal):
    def scale_rows(self, c):
        return self.restrict(self.dense() * c[..., None])


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


@bug("batch_axes_equal_a_loop")
class FirstMatrixForAll(Diagonal):
    def apply_into(self, X, out):
        return self.diag.reshape(-1, self.diag.shape[-1])[0][:, None] * X


@bug("batch_axes_equal_a_loop")
class OnesOfAllMatrices(Diagonal):
    @classmethod
    def summed(cls, A, c, last=None):
        matrices = math.prod(A.shape[:-2])
        return super().summed(A, c, None if last is None else last * matrices**0.5)


@bug("batch_axes_equal_a_loop")
class NumberForOneMatrixAlone(Diagonal):
    def shifted(self, c):
        return self if isinstance(c, float) and self.batch else super().shifted(c)


@bug("batch_axes_equal_a_loop")
class PartOfTheStack(Diagonal):
    def part(self, j):
        return type(self)(self.diag[j])


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


@bug("astype")
class RoundsTwice(Diagonal):
    def astype(self, like):
        xp = namespace(self.diag)
        return type(self)(xp.astype(xp.astype(self.diag, np.float16), like.dtype))


@bug("dtype_of_the_leaf")
class CastsOneArray(Blocks):
    made_by = None

    def astype(self, like):
        return type(self)(super().astype(like).blocks, self.last)


@bug("no_dense_intermediate")
class CastsDense(Diagonal):
    def astype(self, like):
        return self.restrict(namespace(like).astype(self.dense(), like.dtype))
