"""Mistakes in products with arrays, in the projection, and in sums."""

from typing import Any

from planting import Blocks, Hierarchical, bug, library

from singd_core._array import eye, namespace, sum_of_squares, widen
from singd_core.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Structure,
    Tril,
    TrilToeplitz,
    structure,
)


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


@bug("square")
class SquareTheOtherWay(Dense):
    def square(self):
        return Dense(self.matrix.mT @ self.matrix)


@bug("square_for")
class NoSquareForMany(Diagonal):
    def square_for(self, T, columns):
        return self.square() if T * columns < 100 else self


@bug("part")
class FirstRowsOfAsMany(Diagonal):
    def part(self, j):
        return type(self)(self.diag[..., : j.stop - j.start])


@bug("part")
class BlocksOfAStack(Diagonal):
    @property
    def blocks_of(self):
        return 1


@bug("part")
class BlocksOfATriangle(Tril):
    @property
    def blocks_of(self):
        return 1 if self.matrix.ndim == 2 else None

    def part(self, j):
        return type(self)(self.matrix[..., j, j])


@bug("apply_into")
class WritesTheTranspose(Dense):
    def apply_into(self, X, out):
        return self.matrix.mT @ X


@bug("apply_into")
class WritesToACopy(Diagonal):
    """Where `out` is the transpose of what lies in memory, NumPy reshapes a copy."""

    def apply_into(self, X, out):
        out.reshape(-1)[...] = (self.diag[..., None] * X).reshape(-1)
        return out


@bug("scale_rows")
class ScalesColumns(Dense):
    def scale_rows(self, c):
        return Dense(self.matrix * c[..., None, :])


@bug("row_norms")
class NormsOfColumns(Tril):
    def row_norms(self):
        return namespace(self.matrix).linalg.vector_norm(widen(self.matrix), axis=-2)


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


@bug("measured")
class MeasuresTheTransformed(Tril):
    def measured(self, X):
        LtX = self.apply_t(X.mT)
        return self.outer(LtX), sum_of_squares(LtX, 2)


@bug("summed_with_a_last_column")
class SumsALastColumnOfOnes(Tril):
    @classmethod
    def summed(cls, A, c, last=None):
        return super().summed(A, c, None if last is None else 1.0)


@bug("seen")
class SeenFromOneSide(Diagonal):
    def seen(self, U):
        return type(self)(self.diag * U.diag)


@bug("seen")
class SumsOfTheDiagonal(Tril):
    @classmethod
    def sums(cls):
        return Diagonal


@bug("no_rows")
class MeanOverRows(Diagonal):
    @classmethod
    def summed(cls, A, c, last=None):
        return super().summed(A, c / A.shape[-2], last).scale(float(A.shape[-2]))


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


@bug("row_size")
class SizeOfAllRows(Diagonal):
    def row_size(self):
        return self.norm()


@bug("max_abs")
class LargestWithoutAbs(Diagonal):
    def max_abs(self):
        return namespace(self.diag).max(self.diag, axis=-1)


@bug("sums_are_wide")
class NormInHalf(Diagonal):
    def norm(self):
        xp = namespace(self.diag)
        return widen(xp.sqrt(xp.sum(self.diag * self.diag, axis=-1, dtype=self.diag.dtype)))


@bug("sums_are_wide")
class SizeInHalf(Diagonal):
    def row_size(self):
        xp = namespace(self.diag)
        return widen(xp.sqrt(xp.mean(self.diag * self.diag, axis=-1)))


@bug("sums_are_wide")
class RowsInHalf(Tril):
    def row_norms(self):
        xp = namespace(self.matrix)
        return widen(xp.sqrt(xp.sum(self.matrix * self.matrix, axis=-1, dtype=self.matrix.dtype)))


@bug("sums_are_wide")
class MeasuredInHalf(Diagonal):
    def measured(self, A):
        return super().measured(A)[0], widen(namespace(A).sum(A * A, axis=(-2, -1), dtype=A.dtype))
