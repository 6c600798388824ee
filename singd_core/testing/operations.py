"""Every operation of a structure under its name, for the laws that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from singd_core._array import Array, Scalar, is_half, namespace
from singd_core.structures.base import Structure

# of two members of side d, a tall array, a symmetric matrix and a scalar
Operation: TypeAlias = Callable[[Any, Any, Array, Array, Scalar], Any]

# so many products with so many columns, which are worth L Lᵀ in every structure that has it
MANY = 8, 1024


def other(x: Array) -> Array:
    """The array in another dtype: float64 for float32, and float32 for all else."""
    xp = namespace(x)
    return xp.astype(x, xp.float64 if x.dtype == xp.float32 else xp.float32)


def _product(L: Any, P: Any, X: Array) -> Array:
    """P X for P = L Lᵀ, which may be None."""
    return L.precondition(X) if P is None else P.apply(X)


def _apply_into(L: Any, X: Array) -> Array:
    found = L.apply_into(X, namespace(X).zeros_like(X))
    return L.apply(X) if found is None else found


def _scale_rows(L: Any, c: Array) -> Any:
    scaled = L.scale_rows(c)
    return L.apply(c[..., None]) if scaled is None else scaled  # something of c and of L


def _part(L: Any, X: Array) -> Any:
    """Its rows and columns but for those of the first block, if it has others."""
    d = L.shape[-1]
    b = L.identity(d, like=X).blocks_of  # a stack does not say it
    return L if b is None else L.part(slice(b if b < d else 0, d))


OPERATIONS: dict[str, Operation] = {
    "restrict": lambda L, R, X, M, c: L.restrict(M),
    "dense": lambda L, R, X, M, c: L.dense(),
    "project": lambda L, R, X, M, c: L.project(M),
    "outer": lambda L, R, X, M, c: L.outer(X),
    "congruence": lambda L, R, X, M, c: L.congruence(X),
    "measured": lambda L, R, X, M, c: L.measured(X.mT)[0],
    "measured, ‖X‖²": lambda L, R, X, M, c: L.measured(X.mT)[1],
    "summed": lambda L, R, X, M, c: L.summed(X.mT, 2.0),
    "summed, last": lambda L, R, X, M, c: L.summed(X.mT[..., 1:], 2.0, 0.5),
    "seen": lambda L, R, X, M, c: L.seen(L.sums().project(M)),
    "gram": lambda L, R, X, M, c: L.gram(),
    "matmul": lambda L, R, X, M, c: L.matmul(R),
    "__matmul__": lambda L, R, X, M, c: L.__matmul__(R),  # torch.compile knows no `@` of two
    "apply": lambda L, R, X, M, c: L.apply(X),
    "apply_into": lambda L, R, X, M, c: _apply_into(L, X),
    "apply_t": lambda L, R, X, M, c: L.apply_t(X),
    "precondition": lambda L, R, X, M, c: L.precondition(X),
    "square": lambda L, R, X, M, c: _product(L, L.square(), X),
    "square_for": lambda L, R, X, M, c: _product(L, L.square_for(*MANY), X),
    "part": lambda L, R, X, M, c: _part(L, X),
    "scale_rows": lambda L, R, X, M, c: _scale_rows(L, X[..., 0]),
    "row_norms": lambda L, R, X, M, c: L.row_norms(),
    "identity": lambda L, R, X, M, c: L.identity(L.shape[-1], like=X, batch=L.batch),
    "__add__": lambda L, R, X, M, c: L + R,
    "__sub__": lambda L, R, X, M, c: L - R,
    "add_scaled": lambda L, R, X, M, c: L.add_scaled(c, R),
    "scale": lambda L, R, X, M, c: L.scale(c),
    "add_identity": lambda L, R, X, M, c: L.add_identity(c),
    "shifted": lambda L, R, X, M, c: L.scale(1.0).shifted(c),  # a copy: it may change L
    "astype": lambda L, R, X, M, c: L.astype(other(X)),
    "trace": lambda L, R, X, M, c: L.trace(),
    "norm": lambda L, R, X, M, c: L.norm(),
    "row_size": lambda L, R, X, M, c: L.row_size(),
    "max_abs": lambda L, R, X, M, c: L.max_abs(),
}

# what takes a number, or one for each matrix of a stack
SCALARS = ("add_scaled", "scale", "add_identity", "shifted")
# what may form d × d matrices: those whose argument or result is one
DENSE = ("restrict", "dense", "project", "seen")
# what sums up all entries, in at least float32
SUMS = ("trace", "norm", "row_size", "row_norms", "measured, ‖X‖²")


def dtype_of(name: str, leaf: Array) -> Any:
    """The dtype that the result of an operation on arrays like `leaf` has to have."""
    if name == "astype":
        return other(leaf).dtype
    return namespace(leaf).float32 if name in SUMS and is_half(leaf) else leaf.dtype


def arrays(result: Any) -> Iterator[tuple[str, Array]]:
    """The arrays of a result with names: of a structure all, or the array itself."""
    if isinstance(result, Structure):
        yield from result.named_arrays()
    else:
        yield "", result


def everything(L: Any, R: Any, X: Array, M: Array, c: Scalar) -> dict[str, Any]:
    """The results of all operations."""
    return {name: operation(L, R, X, M, c) for name, operation in OPERATIONS.items()}


def step(K: Any, X: Array, beta: Scalar) -> Any:
    """K (I − β m) with m = ½ (Π̂(Kᵀ X Xᵀ K) − I): the heart of the update."""
    m = K.congruence(X).add_identity(-1.0).scale(0.5)
    return K - K.matmul(m).scale(beta)
