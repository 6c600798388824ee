"""2 × 2 block-triangular matrices whose diagonal blocks are structures: rank-k and hierarchical."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from singd_core._array import Array, Scalar, add_product, full, namespace, norm
from singd_core.structures.base import Structure, structure
from singd_core.structures.dense import Dense
from singd_core.structures.diagonal import Diagonal
from singd_core.structures.families import check_size, family
from singd_core.structures.pattern import Pattern


@structure
class BlockTriangular(Pattern):
    """`[[A, B], [0, D]]` (upper) or `[[A, 0], [B, D]]` (lower): A, D structures, B dense.

    `Top` and `Bottom` are the structures of A and D. One of the two has a fixed side `k`: A if
    `k_on_top`, else D. It is filled first when d is small, and the other gets the rest.

    Attributes:
        A: The top left block, side d_A.
        B: The off-diagonal block, shape (..., d_A, d_D) if upper, else (..., d_D, d_A).
        D: The bottom right block, side d_D.
    """

    upper: ClassVar[bool]
    k_on_top: ClassVar[bool]
    k: ClassVar[int]
    Top: ClassVar[type[Structure]]
    Bottom: ClassVar[type[Structure]]

    A: Structure
    B: Array
    D: Structure

    @classmethod
    def _sides(cls, d: int) -> tuple[int, int]:
        k = min(cls.k, d)
        return (k, d - k) if cls.k_on_top else (d - k, k)

    @classmethod
    def _halves(cls, X: Array) -> tuple[Array, Array]:
        """The rows of `X` that meet A and those that meet D."""
        top, _ = cls._sides(X.shape[-2])
        return X[..., :top, :], X[..., top:, :]

    @property
    def shape(self) -> tuple[int, ...]:
        d = self.B.shape[-1] + self.B.shape[-2]
        return (*self.B.shape[:-2], d, d)

    @classmethod
    def numbers(cls, d: int) -> int:
        top, bottom = cls._sides(d)
        return cls.Top.numbers(top) + top * bottom + cls.Bottom.numbers(bottom)

    @classmethod
    def width(cls, d: int) -> int:
        """The widths of both added: every column of B is a row of A's block, next to one of D's."""
        top, bottom = cls._sides(d)
        return cls.Top.width(top) + cls.Bottom.width(bottom)

    @classmethod
    def _blocks(cls, M: Array) -> tuple[Array, Array, Array]:
        """The blocks of a matrix in the places of A, B, D."""
        top, _ = cls._sides(M.shape[-1])
        B = M[..., :top, top:] if cls.upper else M[..., top:, :top]
        return M[..., :top, :top], B, M[..., top:, top:]

    @classmethod
    def restrict(cls, M: Array) -> Self:
        A, B, D = cls._blocks(M)
        return cls(cls.Top.restrict(A), B, cls.Bottom.restrict(D))

    @classmethod
    def project(cls, M: Array) -> Self:
        A, B, D = cls._blocks(M)
        return cls(cls.Top.project(A), 2.0 * B, cls.Bottom.project(D))

    def dense(self) -> Array:
        xp = namespace(self.B)
        zero = full(self.B.mT.shape, 0.0, like=self.B)
        upper_right, lower_left = (self.B, zero) if self.upper else (zero, self.B)
        top = xp.concat([self.A.dense(), upper_right], axis=-1)
        return xp.concat([top, xp.concat([lower_left, self.D.dense()], axis=-1)], axis=-2)

    @classmethod
    def identity(cls, d: int, *, like: Array, batch: Sequence[int] = ()) -> Self:
        top, bottom = cls._sides(d)
        B = full((*batch, top, bottom) if cls.upper else (*batch, bottom, top), 0.0, like=like)
        A = cls.Top.identity(top, like=like, batch=batch)
        return cls(A, B, cls.Bottom.identity(bottom, like=like, batch=batch))

    @classmethod
    def outer(cls, X: Array) -> Self:
        return cls._outer(*cls._halves(X))

    @classmethod
    def _outer(cls, X_A: Array, X_D: Array) -> Self:
        B = X_A @ X_D.mT if cls.upper else X_D @ X_A.mT
        return cls(cls.Top.outer(X_A), 2.0 * B, cls.Bottom.outer(X_D))

    def congruence(self, X: Array) -> Self:
        """Π̂(Lᵀ X Xᵀ L), the halves of LᵀX never joined."""
        return self._outer(*self._halves_of_t(*self._halves(X)))

    def gram(self) -> Self:
        """Π̂(LᵀL), from LᵀL = [[AᵀA, AᵀB], [·, BᵀB + DᵀD]] or [[AᵀA + BᵀB, ·], [DᵀB, DᵀD]]."""
        A, D = self.A.gram(), self.D.gram()
        if self.upper:
            return type(self)(A, 2.0 * self.A.apply_t(self.B), D + self.D.outer(self.B.mT))
        return type(self)(A + self.A.outer(self.B.mT), 2.0 * self.D.apply_t(self.B), D)

    def matmul(self, other: Self) -> Self:
        # upper: A B' + B D'; lower: B A' + D B'
        left, right = (self.A, other.D) if self.upper else (self.D, other.A)
        B = left.apply(other.B) + right.apply_t(self.B.mT).mT
        return type(self)(self.A.matmul(other.A), B, self.D.matmul(other.D))

    def apply(self, X: Array) -> Array:
        return _joined(self._halves_of(*self._halves(X)))

    def apply_t(self, X: Array) -> Array:
        return _joined(self._halves_of_t(*self._halves(X)))

    def precondition(self, X: Array) -> Array:
        return _joined(self._halves_of(*self._halves_of_t(*self._halves(X))))

    def _halves_of(self, X_A: Array, X_D: Array) -> tuple[Array, Array]:
        """The halves of L X."""
        Y_A, Y_D = self.A.apply(X_A), self.D.apply(X_D)
        if self.upper:
            return add_product(Y_A, self.B, X_D), Y_D
        return Y_A, add_product(Y_D, self.B, X_A)

    def _halves_of_t(self, X_A: Array, X_D: Array) -> tuple[Array, Array]:
        """The halves of LᵀX."""
        Y_A, Y_D = self.A.apply_t(X_A), self.D.apply_t(X_D)
        if self.upper:
            return Y_A, add_product(Y_D, self.B.mT, X_A)
        return add_product(Y_A, self.B.mT, X_D), Y_D

    def add_identity(self, c: Scalar) -> Self:
        return type(self)(self.A.add_identity(c), self.B, self.D.add_identity(c))

    def row_norms(self) -> Array:
        A, D, B, xp = self.A.row_norms(), self.D.row_norms(), norm(self.B, 1), namespace(self.B)
        return xp.concat((xp.hypot(A, B), D) if self.upper else (A, xp.hypot(D, B)), axis=-1)

    def trace(self) -> Array:
        return self.A.trace() + self.D.trace()


def _joined(halves: tuple[Array, Array]) -> Array:
    return namespace(halves[0]).concat(halves, axis=-2)


def trilbottomrightdiag(k: int = 1) -> type[BlockTriangular]:
    """Lower triangular `[[A, 0], [B, D]]`: A dense of side `k` ≥ 1, D diagonal."""
    check_size(k, "k")
    return _blocks(
        trilbottomrightdiag, (k,), upper=False, k_on_top=True, Top=Dense, Bottom=Diagonal
    )


def triltopleftdiag(k: int = 1) -> type[BlockTriangular]:
    """Lower triangular `[[A, 0], [B, D]]`: A diagonal, D dense of side `k` ≥ 1."""
    check_size(k, "k")
    return _blocks(triltopleftdiag, (k,), upper=False, k_on_top=False, Top=Diagonal, Bottom=Dense)


def triubottomrightdiag(k: int = 1) -> type[BlockTriangular]:
    """Upper triangular `[[A, B], [0, D]]`: A dense of side `k` ≥ 1, D diagonal."""
    check_size(k, "k")
    return _blocks(triubottomrightdiag, (k,), upper=True, k_on_top=True, Top=Dense, Bottom=Diagonal)


def triutopleftdiag(k: int = 1) -> type[BlockTriangular]:
    """Upper triangular `[[A, B], [0, D]]`: A diagonal, D dense of side `k` ≥ 1."""
    check_size(k, "k")
    return _blocks(triutopleftdiag, (k,), upper=True, k_on_top=False, Top=Diagonal, Bottom=Dense)


def hierarchical(k1: int, k2: int) -> type[BlockTriangular]:
    """`[[A, B₁, B₂], [0, C, 0], [0, D, E]]`: A, E dense of sides `k1`, `k2` ≥ 1, C diagonal.

    Permuted to the order A, E, C it is a chain, so it is closed under multiplication.
    """
    check_size(k1, "k1")
    check_size(k2, "k2")
    bottom = triltopleftdiag(k2)
    return _blocks(hierarchical, (k1, k2), upper=True, k_on_top=True, Top=Dense, Bottom=bottom)


def _blocks(
    factory: Callable[..., type[Structure]], parameters: tuple[int, ...], **attributes: Any
) -> type[BlockTriangular]:
    return family(factory, parameters, BlockTriangular, k=parameters[0], **attributes)
