"""What a structure is: a linear space of square matrices that is closed under multiplication."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from singd_core._array import (
    Array,
    Scalar,
    append_ones,
    cast,
    expand,
    eye,
    is_half,
    multiply_add,
    namespace,
    norm,
    sum_of_squares,
    widen,
)
from singd_core._tree import Tree
from singd_core._tree import tree as structure

__all__ = ["Structure", "structure"]


class Structure(Tree):
    """A structured matrix `L`, or a stack of them: a frozen dataclass of arrays.

    The class stands for a linear subspace 𝔤 of d × d matrices. 𝔤 holds the identity and is closed
    under multiplication, so the update `K ← K (I − β m)` stays in it. The arrays may have leading
    batch axes. Every operation works on the trailing axes.

    A new structure is a class decorated with `structure`. Its fields are arrays or structures. It
    writes two methods:

    - `restrict(M)`, a linear retraction of any matrix onto 𝔤, and
    - `dense()`, its inverse on 𝔤.

    All other methods have a correct version here, which forms d × d matrices. Override them to be
    fast. `singd_core.testing` checks the result.
    """

    name: ClassVar[str] = ""
    made_by: ClassVar[tuple[Callable[..., type[Structure]], tuple[Any, ...]] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the class."""
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__.lower())

    # ---- what a structure must write ------------------------------------------------------------

    @classmethod
    def restrict(cls, M: Array) -> Self:
        """The member of 𝔤 that agrees with `M`, shape (..., d, d), on what a member stores."""
        raise NotImplementedError(f"{cls.__name__} must define restrict(M)")

    def dense(self) -> Array:
        """The matrix itself, shape (..., d, d)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense()")

    # ---- the projection -------------------------------------------------------------------------

    @classmethod
    def project(cls, M: Array) -> Self:
        """Π̂(M) of a *symmetric* `M`, shape (..., d, d).

        ¼⟨Π̂(M) + Π̂(M)ᵀ, S + Sᵀ⟩ = ⟨M, S⟩ for all S in 𝔤 fixes it (docs/mathematics.md, section 4).
        The version here, 2 R(M) − R(R(M)ᵀ), solves this equation under two conditions. R =
        `restrict` is the orthogonal projection onto 𝔤, and the part of a member outside 𝔤ᵀ is
        orthogonal to 𝔤ᵀ, as in every zero pattern. Any other structure must write its own.
        """
        R = cls.restrict(M)
        return R.scale(2.0) - cls.restrict(R.dense().mT)

    @classmethod
    def outer(cls, X: Array) -> Self:
        """Π̂(X Xᵀ) of a tall array `X`, shape (..., d, n)."""
        return cls.project(X @ X.mT)

    def congruence(self, X: Array) -> Self:
        """Π̂(Lᵀ X Xᵀ L) of a tall array `X`, shape (..., d, n)."""
        return self.outer(self.apply_t(X))

    def measured(self, A: Array) -> tuple[Self, Array]:
        """Π̂(Lᵀ AᵀA L) of rows `A`, shape (..., n, d), and ‖A‖², in at least float32."""
        return self.congruence(A.mT), sum_of_squares(A, 2)

    @classmethod
    def summed(cls, A: Array, c: float, last: float | None = None) -> Self:
        """Π̂(XᵀX) of rows X, shape (..., n, d), times c > 0. n may be 0.

        X is `A`. If `last` is given, X has one more column of this number: the ones of a bias. A
        structure need not write this column to memory.
        """
        X = A if last is None else append_ones(A, A.ndim - 1, last)
        return cls.outer(X.mT).scale(c)

    @classmethod
    def sums(cls) -> type[Structure]:
        """The structure in which XᵀX is summed up where L is not known: see `seen`."""
        from singd_core.structures.dense import Dense

        return Dense

    def seen(self, U: Structure) -> Self:
        """Π̂(Lᵀ U L) of a symmetric U, from what `sums` keeps of it.

        The version here needs all of U. A structure that keeps less writes both methods.
        """
        return self.project(self.apply_t(self.apply_t(U.dense()).mT))

    def gram(self) -> Self:
        """Π̂(Lᵀ L)."""
        L = self.dense()
        return self.project(L.mT @ L)

    # ---- products -------------------------------------------------------------------------------

    def matmul(self, other: Self) -> Self:
        """The product `L L'` with a member of the same structure."""
        return self.restrict(self.dense() @ other.dense())

    def __matmul__(self, other: Self) -> Self:
        """`L @ L'`; products with arrays are `apply` and `apply_t`."""
        return self.matmul(other)

    def apply(self, X: Array) -> Array:
        """`L X` for `X` of shape (..., d, n)."""
        return self.dense() @ X

    def apply_t(self, X: Array) -> Array:
        """`Lᵀ X` for `X` of shape (..., d, n)."""
        return self.dense().mT @ X

    def precondition(self, X: Array) -> Array:
        """`L Lᵀ X` for `X` of shape (..., d, n)."""
        return self.apply(self.apply_t(X))

    def apply_into(self, X: Array, out: Array) -> Array | None:
        """`L X`, written to `out` if arrays can be written to; None if only `apply` is known.

        `out` has the shape and dtype of `X`. It may be the transpose of what lies in memory.
        """
        return None

    @property
    def blocks_of(self) -> int | None:
        """The number of rows of its blocks, if it is one matrix of blocks along the diagonal."""
        return None

    def part(self, j: slice) -> Self:
        """Its rows and columns `j`, which are whole blocks. A stack has those of each matrix.

        Raises:
            NotImplementedError: If the structure has no blocks along the diagonal.
        """
        raise NotImplementedError(f"{type(self).__name__} is not of blocks along the diagonal")

    def scale_rows(self, c: Array) -> Structure | None:
        """`diag(c) L`, with c of shape (..., d), if it is of a structure; else None."""
        return None

    def square(self) -> Structure | None:
        """`L Lᵀ`, in whatever structure it has, if one product with it costs less than two.

        None otherwise. A caller that multiplies with `L Lᵀ` often can keep it.
        """
        return None

    def square_for(self, T: int, columns: int) -> Structure | None:
        """`square`, if it saves time for T products with so many columns.

        For blocks of side b it costs b³ each, and b² a column. Products with L and Lᵀ cost 2 b².
        One product in 16 bits is better exact: rounding `square` loses what L makes small.
        """
        rounds = T == 1 and is_half(self.like)
        saves = T * columns > self.width(self.shape[-1])
        return self.square() if saves and not rounds else None

    # ---- the linear space -----------------------------------------------------------------------

    @classmethod
    def identity(cls, d: int, *, like: Array, batch: Sequence[int] = ()) -> Self:
        """The identity (a stack of shape `batch`), with the dtype and device of `like`."""
        return cls.restrict(eye(d, like=like, batch=batch))

    def __add__(self, other: Self) -> Self:
        """`L + L'`."""
        return self.add_scaled(1.0, other)

    def __sub__(self, other: Self) -> Self:
        """`L − L'`."""
        return self.add_scaled(-1.0, other)

    def scale(self, c: Scalar) -> Self:
        """`c L`, for a number or an array of the batch axes' shape."""
        return self.map(lambda a: a * expand(c, a))

    def add_scaled(self, c: Scalar, other: Self) -> Self:
        """`L + c L'`, for a number or an array of the batch axes' shape."""
        return self.map(lambda a, b: multiply_add(b, expand(c, b), a), other)

    def add_identity(self, c: Scalar) -> Self:
        """`L + c I`, for a number or an array of the batch axes' shape."""
        *batch, d, _ = self.shape
        return self + self.identity(d, like=self.like, batch=batch).scale(c)

    def shifted(self, c: Scalar) -> Self:
        """`L + c I`, in place of L, where arrays can be written to."""
        return self.add_identity(c)

    # ---- numbers --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """(*batch, d, d)."""
        return tuple(self.dense().shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the batch axes, `()` for a single matrix."""
        return self.shape[:-2]

    @classmethod
    def has_side(cls, d: int) -> bool:
        """Whether the structure has d × d matrices, d ≥ 1. Most structures have them for every d.

        The laws try only these sides, and an optimizer refuses other sides before it starts.
        """
        return True

    @classmethod
    def numbers(cls, d: int) -> int:
        """How many numbers are stored for one d × d matrix."""
        import numpy as np

        return sum(a.size for _, a in cls.identity(d, like=np.zeros(())).named_arrays())

    @classmethod
    def width(cls, d: int) -> int:
        """The side of the largest dense block of a d × d matrix: it needs about as many rows."""
        return d

    def trace(self) -> Array:
        """The trace, of the batch axes' shape, in at least float32."""
        xp, L = namespace(self.like), self.dense()
        return xp.sum(widen(xp.linalg.diagonal(L)), axis=-1)

    def norm(self) -> Array:
        """The Frobenius norm, of the batch axes' shape, in at least float32."""
        return namespace(self.like).sqrt(sum_of_squares(self.dense(), 2))

    def row_size(self) -> Array:
        """The root mean square of the norms of the rows, as `norm` has it."""
        return self.norm() * (1.0 / math.sqrt(max(1, self.shape[-1])))

    def max_abs(self) -> Array:
        """The largest absolute value of an entry, of the batch axes' shape."""
        xp = namespace(self.like)
        return xp.max(xp.abs(self.dense()), axis=(-2, -1))

    def row_norms(self) -> Array:
        """The norms of the rows, shape (..., d), in at least float32: √diag(L Lᵀ)."""
        return norm(self.dense(), 1)

    # ---- the arrays -----------------------------------------------------------------------------

    @property
    def like(self) -> Array:
        """One of the arrays: it tells namespace, dtype and device."""
        first = getattr(self, self.field_names()[0])
        return first.like if isinstance(first, Structure) else first

    def astype(self, like: Array) -> Self:
        """The same matrix in the dtype of `like`."""
        return self if self.like.dtype == like.dtype else self.map(lambda a: cast(a, like))

    def __repr__(self) -> str:
        """Name, shape and dtype; `dense()` shows the numbers."""
        return f"{self.name}(shape={self.shape}, dtype={self.like.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a class that a factory made by the factory's call."""
        values = tuple(getattr(self, name) for name in self.field_names())
        # of the class itself, since a subclass inherits the attribute
        return _rebuild, (type(self).__dict__.get("made_by") or type(self), values)


def _rebuild(origin: Any, values: tuple[Any, ...]) -> Structure:
    cls = origin if isinstance(origin, type) else origin[0](*origin[1])
    return cls(*values)  # type: ignore[no-any-return]
