"""Laws of products with tall arrays, the projection Π̂, and trace, norm and largest entry."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np

from singd_core._array import full
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.mismatch import require
from singd_core.testing.operations import MANY

_EAGER = ("numpy", "strict", "torch", "cupy")  # in jax, the law of `jit` compares the others


@law()
def apply(case: Case) -> None:
    """`L.apply(X)` is L X."""
    L, X = case.member(), case.rows()
    case.same(L.apply(X), lambda L, X: L @ X, L, X)


@law()
def apply_t(case: Case) -> None:
    """`L.apply_t(X)` is Lᵀ X."""
    L, X = case.member(), case.rows()
    case.same(L.apply_t(X), lambda L, X: L.T @ X, L, X)


@law()
def precondition(case: Case) -> None:
    """`L.precondition(X)` is L Lᵀ X."""
    L, X = case.member(), case.rows()
    case.same(L.precondition(X), lambda L, X: L @ L.T @ X, L, X)


@law()
def square(case: Case) -> None:
    """`L.square()` is L Lᵀ, or None."""
    L = case.member()
    if (P := L.square()) is not None:
        case.same(P, lambda L: L @ L.T, L)


@law(backends=_EAGER)
def square_for(case: Case) -> None:
    """`L.square_for(T, columns)` is L Lᵀ, or None, for few products and for many."""
    L = case.member()
    for T, columns in ((1, 1), MANY):
        if (P := L.square_for(T, columns)) is not None:
            case.same(P, lambda L: L @ L.T, L)


@law(backends=_EAGER)
def part(case: Case) -> None:
    """If `L.blocks_of` is b, L is 0 but in blocks of b rows, and `L.part(j)` has the rows j."""
    L, stack = case.member(), case.member("Ls", (2,))
    require(stack.blocks_of is None, f"a stack says that it has blocks of {stack.blocks_of} rows")
    b, d = L.blocks_of, case.d
    if b is None:
        return
    require(b >= 1, f"it says that it has blocks of {b} rows")
    block = np.arange(d) // b
    case.same(L, lambda L: np.where(block[:, None] == block, L, 0.0), L)
    cuts = sorted({0, min(b, d), d // b * b, d})
    for j in (slice(start, stop) for start in cuts for stop in cuts if start < stop):
        case.same(L.part(j), lambda L, j=j: L[j, j], L)


@law()
def apply_into(case: Case) -> None:
    """`L.apply_into(X, out)` is L X, in `out` where arrays can be written to, or None."""
    L, X = case.member(), case.rows()
    # what is written to may be the transpose of what lies in memory
    for out in (full(X.shape, 0.0, like=X), full(X.mT.shape, 0.0, like=X).mT):
        if (found := L.apply_into(X, out)) is not None:
            case.same(found, lambda L, X: L @ X, L, X)
            case.equal(X, case.numpy(case.rows()), "X")


@law()
def scale_rows(case: Case) -> None:
    """`L.scale_rows(c)` is diag(c) L, or None."""
    L, c = case.member(), case.array("c", case.d)
    if (found := L.scale_rows(c)) is not None:
        case.same(found, lambda L, c: c[:, None] * L, L, c)


@law()
def row_norms(case: Case) -> None:
    """`L.row_norms()` are the Euclidean norms of the rows, shape (d,)."""
    L = case.member()
    case.same(L.row_norms(), lambda L: np.sqrt(np.sum(L * L, axis=1)), L, exact=False)


@law()
def associative(case: Case) -> None:
    """`(L R) X` is `L (R X)`."""
    L, R, X = case.member("L"), case.member("R"), case.rows()
    case.same(L.matmul(R).apply(X), lambda L, R, X: L @ R @ X, L, R, X)
    case.same(L.apply(R.apply(X)), lambda L, R, X: L @ R @ X, L, R, X)


@cache
def basis(S: Any, d: int) -> np.ndarray:
    """A spanning set of 𝔤, shape (d², d, d): the restrictions of the matrices with a single 1."""
    ones = np.eye(d * d).reshape(d * d, d, d)
    return np.stack([np.asarray(S.restrict(E).dense()) for E in ones])


@law()
def projection(case: Case) -> None:
    """`project(M)` is the P with ¼⟨P + Pᵀ, S + Sᵀ⟩ = ⟨M, S⟩ for every S of a basis of 𝔤."""
    if case.d > 40:
        return  # its basis has d² matrices of d² numbers
    S: Any = case.S
    B, M = basis(S, case.d), case.symmetric()
    P = case.numpy(case.S.project(M))
    left = 0.25 * np.einsum("kij,ij->k", B + B.swapaxes(1, 2), P + P.T)
    case.same(left, lambda M: np.einsum("kij,ij->k", B, M), M)


@law()
def projection_is_a_member(case: Case) -> None:
    """`project(M)` is in 𝔤: restricting it changes nothing."""
    P = case.S.project(case.symmetric())
    case.same(case.S.restrict(P.dense()), lambda P: P, P)


@law()
def projection_as_in_numpy(case: Case) -> None:
    """`project(M)` is the same matrix as with NumPy in float64."""
    M = case.symmetric()
    case.same(case.S.project(M), lambda M: case.S.project(M).dense(), M)


@law()
def outer(case: Case) -> None:
    """`outer(X)` is Π̂(X Xᵀ)."""
    X = case.rows()
    case.same(case.S.outer(X), lambda X: case.S.project(X @ X.T).dense(), X)


@law()
def congruence(case: Case) -> None:
    """`L.congruence(X)` is Π̂(Lᵀ X Xᵀ L), for few columns and for many."""
    L = case.member()
    for X in (case.rows("X", 3), case.rows("Y", 2 * case.d + 1)):
        case.same(L.congruence(X), lambda L, X: case.S.project(L.T @ X @ X.T @ L).dense(), L, X)


@law()
def measured(case: Case) -> None:
    """`L.measured(A)` of rows A is Π̂(Lᵀ AᵀA L) and ‖A‖², and `summed(A, c)` c AᵀA."""
    L, A = case.member(), case.array("A", 3, case.d)
    projected, squares = L.measured(A)
    case.same(projected, lambda L, A: case.S.project(L.T @ A.T @ A @ L).dense(), L, A)
    case.same(squares, lambda A: np.sum(A * A), A, exact=False)
    case.same(case.S.summed(A, 4.0), lambda A: case.S.project(4.0 * A.T @ A).dense(), A)


@law()
def summed_with_a_last_column(case: Case) -> None:
    """`summed(A, c, last)` sums A with one more column, for few rows and for many."""
    whole = partial(np.pad, pad_width=((0, 0), (0, 1)), constant_values=0.5)
    for n in (2, 2 * case.d + 1):
        A = case.array("A", n, case.d - 1)
        projected = case.S.summed(A, 4.0, 0.5)
        case.same(projected, lambda A: case.S.project(4.0 * whole(A).T @ whole(A)).dense(), A)


@law(backends=_EAGER)
def seen(case: Case) -> None:
    """`L.seen(U)` is Π̂(Lᵀ M L), of the projection U of M onto the structure `sums()`."""
    L, M = case.member(), case.symmetric()
    U = case.S.sums().project(M)
    case.same(L.seen(U), lambda L, M: case.S.project(L.T @ M @ L).dense(), L, M)


@law()
def gram(case: Case) -> None:
    """`L.gram()` is Π̂(Lᵀ L)."""
    L = case.member()
    case.same(L.gram(), lambda L: case.S.project(L.T @ L).dense(), L)


@law()
def no_columns(case: Case) -> None:
    """Without columns, `apply` and `apply_t` give none, and `outer` and `congruence` zero."""
    L, X = case.member(), case.rows(n=0)
    case.equal(L.apply(X), np.zeros((case.d, 0)), "apply")
    case.equal(L.apply_t(X), np.zeros((case.d, 0)), "apply_t")
    case.equal(case.S.outer(X), np.zeros((case.d, case.d)), "outer")
    case.equal(L.congruence(X), np.zeros((case.d, case.d)), "congruence")


@law(backends=_EAGER, examples=1)
def no_rows(case: Case) -> None:
    """Without rows, `measured` and `summed` are zero, of a stack and with a last column too."""
    for batch in ((), (2,)):
        L, A = case.member("L", batch), case.array("A", *batch, 0, case.d)
        zero = np.zeros((*batch, case.d, case.d))
        projected, squares = L.measured(A)
        case.equal(projected, zero, "measured")
        case.equal(squares, np.zeros(batch), "‖A‖²")
        case.equal(case.S.summed(A, 4.0), zero, "summed")
        case.equal(case.S.summed(A[..., 1:], 4.0, 0.5), zero, "summed with a last column")


@law()
def trace(case: Case) -> None:
    """`L.trace()` is the trace."""
    L = case.member()
    case.same(L.trace(), np.trace, L)


@law()
def norm(case: Case) -> None:
    """`L.norm()` is the Frobenius norm."""
    L = case.member()
    case.same(L.norm(), np.linalg.norm, L, exact=False)


@law()
def row_size(case: Case) -> None:
    """`L.row_size()` is the root mean square of the norms of the rows."""
    L = case.member()
    case.same(L.row_size(), lambda L: np.linalg.norm(L) / np.sqrt(len(L)), L, exact=False)


@law()
def max_abs(case: Case) -> None:
    """`L.max_abs()` is the largest absolute value of an entry."""
    L = case.member()
    case.same(L.max_abs(), lambda L: np.max(np.abs(L)), L)


@law(
    backends=("numpy", "torch", "cupy"),
    dtypes=("bfloat16", "float16"),
    examples=1,
    floats=False,
    sizes=(300,),
)
def sums_are_wide(case: Case) -> None:
    """In 16 bits, sums over the entries of a member, and over rows, come out as in float32."""
    # in bfloat16 300 ones add up to 256; in float16 the squares of 256 and these sums overflow
    d, everywhere = case.d, case.to(np.full((case.d, case.d), 256.0))
    I = case.S.identity(d, like=everywhere)
    for L in (I.scale(256.0), case.S.restrict(everywhere)):
        dense = case.numpy(L)
        norms = np.linalg.norm(dense, axis=1)
        _require_wide(case, "trace", L.trace(), np.trace(dense))
        _require_wide(case, "norm", L.norm(), np.linalg.norm(norms))
        _require_wide(case, "row_size", L.row_size(), np.linalg.norm(norms) / d**0.5)
        _require_wide(case, "row_norms", L.row_norms(), norms)
    _, squares = I.measured(case.to(np.full((7, d), 16.0)))
    _require_wide(case, "measured, ‖A‖²", squares, 7.0 * d * 16.0**2)


def _require_wide(case: Case, name: str, actual: Any, expected: Any) -> None:
    got = case.numpy(actual)
    # float32 rounds some hundred times
    near = np.abs(got - expected) <= 2.0**-16 * np.abs(expected)
    require(bool(np.all(near)), f"{name}: expected {expected}, got {got}")
