"""Block-diagonal matrices of equal blocks, with a smaller last one for the remainder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from singd_core._array import (
    Array,
    Scalar,
    add_diagonal,
    append_ones,
    concat,
    expand,
    eye,
    full,
    namespace,
    norm,
    product,
    widen,
)
from singd_core.structures.base import Structure, structure
from singd_core.structures.families import check_size, family
from singd_core.structures.pattern import Pattern


@structure
class BlockDiagonal(Pattern):
    """⌊d/b⌋ dense blocks of side `b` and a last one of side d mod b: about d b numbers.

    Attributes:
        blocks: Shape (..., ⌊d/b⌋, b, b).
        last: Shape (..., d mod b, d mod b), possibly empty.
    """

    b: ClassVar[int]

    blocks: Array
    last: Array

    @property
    def shape(self) -> tuple[int, ...]:
        q, b = self.blocks.shape[-3:-1]
        d = q * b + self.last.shape[-1]
        return (*self.last.shape[:-2], d, d)

    @classmethod
    def numbers(cls, d: int) -> int:
        return d // cls.b * cls.b**2 + (d % cls.b) ** 2

    @classmethod
    def width(cls, d: int) -> int:
        return min(cls.b, d)

    @classmethod
    def restrict(cls, M: Array) -> Self:
        xp, b = namespace(M), cls.b
        *batch, d, _ = M.shape
        q = d // b
        blocks = [M[..., i * b : i * b + b, i * b : i * b + b] for i in range(q)]
        stacked = xp.stack(blocks, axis=-3) if q else full((*batch, 0, b, b), 0.0, like=M)
        return cls(stacked, M[..., q * b :, q * b :])

    project = restrict

    def dense(self) -> Array:
        d = self.shape[-1]
        return self.apply(eye(d, like=self.last, batch=self.batch))

    @classmethod
    def identity(cls, d: int, *, like: Array, batch: Sequence[int] = ()) -> Self:
        q, r = divmod(d, cls.b)
        blocks = eye(cls.b, like=like, batch=(*batch, q))
        return cls(blocks, eye(r, like=like, batch=batch))

    @classmethod
    def _split(cls, X: Array) -> tuple[Array, Array]:
        """The rows of `X` by blocks, shape (..., ⌊d/b⌋, b, n), and the remaining ones."""
        *batch, d, n = X.shape
        q = d // cls.b
        head = X if q * cls.b == d else X[..., : q * cls.b, :]
        return namespace(X).reshape(head, (*batch, q, cls.b, n)), X[..., q * cls.b :, :]

    def _join(self, blocks: Array, last: Array) -> Array:
        *batch, q, b, n = blocks.shape
        return concat([namespace(blocks).reshape(blocks, (*batch, q * b, n)), last], axis=-2)

    @classmethod
    def outer(cls, X: Array) -> Self:
        blocks, last = cls._split(X)
        return cls(blocks @ blocks.mT, last @ last.mT)

    def congruence(self, X: Array) -> Self:
        """Π̂(Lᵀ X Xᵀ L), by the order of products that costs less, as for a dense matrix."""
        if X.shape[-1] <= 2 * self.b:
            blocks, last = self._apply_t(X)
            return type(self)(blocks @ blocks.mT, last @ last.mT)
        return self.map(lambda L, U: L.mT @ U @ L, self.outer(X))

    @classmethod
    def summed(cls, A: Array, c: float, last: float | None = None) -> Self:
        # Rows of several blocks are written anew in any case, and scaled while they are.
        *batch, n, d = A.shape
        q, r = divmod(d + (last is not None), cls.b)
        if last is not None and r != 1:
            A, last = append_ones(A, A.ndim - 1, last), None
        head, of_sums = A if A.shape[-1] == q * cls.b else A[..., : q * cls.b], c
        if q > 1:
            head, of_sums = head * c**0.5, 1.0
        blocks = namespace(A).reshape(head.mT, (*batch, q, cls.b, n))
        if last is not None:  # the ones are all of the last block
            of_rest = full((*batch, 1, 1), n * last * last * c, like=A)
        else:
            rest = A[..., q * cls.b :]
            of_rest = rest.mT @ rest * c
        return cls(blocks @ blocks.mT * of_sums, of_rest)

    @classmethod
    def sums(cls) -> type[Structure]:
        return cls

    def seen(self, U: Structure) -> Self:
        return self.map(lambda L, block: L.mT @ block @ L, U)  # type: ignore[arg-type]

    def gram(self) -> Self:
        return type(self)(self.blocks.mT @ self.blocks, self.last.mT @ self.last)

    def matmul(self, other: Self) -> Self:
        return type(self)(self.blocks @ other.blocks, self.last @ other.last)

    def apply(self, X: Array) -> Array:
        blocks, last = self._split(X)
        return self._join(self.blocks @ blocks, self.last @ last)

    def apply_t(self, X: Array) -> Array:
        return self._join(*self._apply_t(X))

    def _apply_t(self, X: Array) -> tuple[Array, Array]:
        blocks, last = self._split(X)
        return self.blocks.mT @ blocks, self.last.mT @ last

    def precondition(self, X: Array) -> Array:
        blocks, last = self._apply_t(X)
        return self._join(self.blocks @ blocks, self.last @ last)

    def apply_into(self, X: Array, out: Array) -> Array:
        into = self._split(out)
        blocks, last = self._split(X)
        found = product(self.blocks, blocks, into[0]), product(self.last, last, into[1])
        written = all(a is b for a, b in zip(found, into, strict=True))
        return out if written else self._join(*found)

    @property
    def blocks_of(self) -> int | None:
        return self.b if self.blocks.ndim == 3 else None

    def part(self, j: slice) -> Self:
        d = self.shape[-1]
        start, stop, _ = j.indices(d)
        last = self.last if stop == d else self.last[..., :0, :0]
        return type(self)(self.blocks[..., start // self.b : stop // self.b, :, :], last)

    def square(self) -> Self:
        return type(self)(self.blocks @ self.blocks.mT, self.last @ self.last.mT)

    def row_norms(self) -> Array:
        rows = [norm(a, 1) for a in (self.blocks, self.last)]
        *batch, q, b = rows[0].shape
        return concat([namespace(rows[0]).reshape(rows[0], (*batch, q * b)), rows[1]], axis=-1)

    def scale_rows(self, c: Array) -> Self:
        blocks, last = self._split(c[..., None])
        return type(self)(self.blocks * blocks, self.last * last)

    def add_identity(self, c: Scalar) -> Self:
        return self.map(lambda a: a + expand(c, a) * eye(a.shape[-1], like=a))

    def shifted(self, c: Scalar) -> Self:
        return self.map(lambda a: add_diagonal(a, c))

    def trace(self) -> Array:
        xp = namespace(self.last)
        blocks = xp.sum(widen(xp.linalg.diagonal(self.blocks)), axis=(-2, -1))
        return blocks + xp.sum(widen(xp.linalg.diagonal(self.last)), axis=-1)


def blockdiagonal(b: int) -> type[BlockDiagonal]:
    """Block-diagonal matrices with blocks of side `b` ≥ 1."""
    check_size(b, "b")
    return family(blockdiagonal, (b,), BlockDiagonal, b=b)
