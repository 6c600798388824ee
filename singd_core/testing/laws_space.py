"""Laws of the linear space 𝔤: its retraction, sums, multiples and identity; its products."""

from __future__ import annotations

import numpy as np

from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.mismatch import require


@law()
def restriction_is_a_retraction(case: Case) -> None:
    """`restrict(M).dense()` is a member: restricting it again changes neither it nor its arrays."""
    L = case.member("M")
    again = case.S.restrict(L.dense())
    case.same(again, lambda L: L, L)
    for (name, old), (_, new) in zip(L.named_arrays(), again.named_arrays(), strict=True):
        case.same(new, lambda a: a, old)
        require(old.shape == new.shape, f"the array {name!r} has another shape")


@law()
def restriction_is_linear(case: Case) -> None:
    """`restrict(2 M + N)` is `2 restrict(M) + restrict(N)`."""
    M, N = case.numbers("M", case.d, case.d), case.numbers("N", case.d, case.d)
    both = case.S.restrict(case.to(2.0 * M + N))
    each = case.S.restrict(case.to(M)), case.S.restrict(case.to(N))
    case.same(both, lambda M, N: 2.0 * M + N, *each)


@law()
def restriction_as_in_numpy(case: Case) -> None:
    """`restrict(M)` is the same matrix as with NumPy in float64."""
    M = case.array("M", case.d, case.d)
    case.same(case.S.restrict(M), lambda M: case.S.restrict(M).dense(), M)


@law(backends=("numpy", "strict", "torch", "cupy"))
def shape(case: Case) -> None:
    """`shape` is (*batch, d, d) and `batch` its first axes, for a stack too."""
    for batch in ((), (2,), (2, 3)):
        L = case.S.restrict(case.array(f"M{len(batch)}", *batch, case.d, case.d))
        expected = (*batch, case.d, case.d)
        require(L.shape == expected, f"expected shape {expected}, got {L.shape}")
        require(L.batch == batch, f"expected batch {batch}, got {L.batch}")
        got = tuple(L.dense().shape)
        require(got == expected, f"expected dense() of shape {expected}, got {got}")


@law()
def identity(case: Case) -> None:
    """The identity is a member of the structure, and `identity(d)` is it."""
    eye = case.to(np.eye(case.d))
    case.same(case.S.restrict(eye), lambda I: I, eye)
    case.same(case.S.identity(case.d, like=eye), lambda I: I, eye)
    stack = case.S.identity(case.d, like=eye, batch=(2, 1))
    case.same(stack, lambda I: np.broadcast_to(I, (2, 1, *I.shape)), eye)


@law()
def sums(case: Case) -> None:
    """`L + R`, `L - R` and `L.add_scaled(c, R)` are what they are of the dense matrices."""
    L, R = case.member("L"), case.member("R")
    case.same(L + R, lambda L, R: L + R, L, R)
    case.same(L - R, lambda L, R: L - R, L, R)
    for c in (3.0, case.to(3.0)):
        case.same(L.add_scaled(c, R), lambda L, R, c: L + c * R, L, R, c)


@law()
def scalar_multiples(case: Case) -> None:
    """`L.scale(c)` is c L, for a number and for a 0-d array."""
    L = case.member()
    for c in (-2.0, case.to(-2.0)):
        case.same(L.scale(c), lambda L, c: c * L, L, c)


@law()
def zero(case: Case) -> None:
    """`L.scale(0.0)` and `L - L` are the zero matrix, and so is the restriction of zero."""
    L = case.member()
    zeros = np.zeros((case.d, case.d))
    case.equal(L.scale(0.0), zeros, "scale(0.0)")
    case.equal(L - L, zeros, "L - L")
    case.equal(case.S.restrict(case.to(zeros)), zeros, "restrict(0)")


@law()
def add_identity(case: Case) -> None:
    """`L.add_identity(c)` is L + c I, for a number and for a 0-d array."""
    L = case.member()
    for c in (3.0, case.to(3.0)):
        case.same(L.add_identity(c), lambda L, c: L + c * np.eye(case.d), L, c)


@law(backends=("numpy", "strict", "torch", "cupy"))  # in jax, that of `jit` compares it
def shifted(case: Case) -> None:
    """`L.shifted(c)`, which may overwrite L, is L + c I, for a number and for a 0-d array."""
    for c in (3.0, case.to(3.0)):
        L = case.member()
        before = L.scale(1.0)
        case.same(L.shifted(c), lambda L, c: L + c * np.eye(case.d), before, c)


@law()
def closed_under_product(case: Case) -> None:
    """The product of two members is a member: restricting it changes nothing."""
    L, R = case.member("L"), case.member("R")
    product = case.to(case.numpy(L) @ case.numpy(R))
    case.same(case.S.restrict(product), lambda L, R: L @ R, L, R)


@law()
def product(case: Case) -> None:
    """`L.matmul(R)` and `L @ R` are the product of the dense matrices."""
    L, R = case.member("L"), case.member("R")
    case.same(L.matmul(R), lambda L, R: L @ R, L, R)
    case.same(L @ R, lambda L, R: L @ R, L, R)
