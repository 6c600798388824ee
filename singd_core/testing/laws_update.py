"""Laws of the update: K and C of one layer follow the mathematics page, and stay what they are.

K (side d) and C (the next side, d + 1 for most) both have the structure; the oracle is the page's
recursion on dense matrices in NumPy float64, with the structure's Π̂.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from singd_core._recipes import settings
from singd_core.structures import Dense
from singd_core.testing.backends import EPS
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.mismatch import require
from singd_core.testing.recursion import IKFAC, SINGD, draw_rows, measured, page, run

_EAGER = ("numpy", "strict", "torch", "cupy")  # in jax each new operation compiles


def compare(case: Case, factors: Any, K: np.ndarray, C: np.ndarray) -> None:
    """Compare the factors, up to rounding, with dense ones."""
    for actual, expected in ((factors.K, K), (factors.C, C)):
        size = 1.0 + float(np.max(np.abs(expected)))
        case.same(actual, lambda x: x, expected, exact=False, scale=case.d * size)


@law(examples=3, sizes=(1, 4))
def update_as_on_the_page(case: Case) -> None:
    """IKFAC and SINGD are the recursion of the mathematics page with the structure's Π̂."""
    rows = draw_rows(case, 2)
    for s in (IKFAC, SINGD):
        compare(case, run(case, rows, s), *page(case, rows, s))


@law(backends=_EAGER, examples=3, sizes=(1, 4))
def update_stays_in_the_structure(case: Case) -> None:
    """After an update K, C and their momenta are members, in the dtype they had."""
    for s in (SINGD, settings("normalized")):
        factors = run(case, draw_rows(case, 2), s)
        for name in ("K", "C", "m_K", "m_C"):
            L = getattr(factors, name)
            if L is None:
                continue
            require(type(L) is case.S, f"{name} is a {type(L).__name__}")
            for _, a in L.named_arrays():
                require(a.dtype == case.to(0.0).dtype, f"{name} is in {a.dtype}")
            dense = case.numpy(L)
            size = float(np.max(np.abs(dense)))
            case.same(case.S.restrict(L.dense()), lambda x: x, dense, exact=False, scale=size)


def keeps_symmetric_parts(S: Any, d: int) -> bool:
    """Whether Π̂(M) + Π̂(M)ᵀ is 2 M for every symmetric M: so it is in dense, tril and triu."""
    M = np.arange(1.0, 1.0 + d**2).reshape(d, d)
    P = np.asarray(S.project(M + M.T).dense())
    return np.allclose(P + P.T, 2.0 * (M + M.T))


def require_second_order(case: Case, gaps: Sequence[float], KKt: np.ndarray) -> None:
    """Halving β₁ quarters a gap, up to the third order in the change of K Kᵀ, and rounding."""
    whole, half = gaps
    change = float(np.max(np.abs(KKt - np.eye(len(KKt)))))
    require(
        half <= whole / 3.5 + change**3 + 100.0 * EPS[case.dtype],
        f"halving β₁ takes the gap from {whole:.2g} to {half:.2g}, not to a quarter",
    )


@law(dtypes=("float64", "float32"), examples=3, sizes=(1, 4), floats=False)
def ikfac_is_kfac_to_second_order(case: Case) -> None:
    """Where Π̂(M) + Π̂(M)ᵀ is 2 M, K Kᵀ of IKFAC is KFAC's (S_K + λI)⁻¹ + O(β₁²) (Theorem 1)."""
    if not keeps_symmetric_parts(case.S, case.d):
        return
    # K starts at I, and so (S_K + λI)⁻¹ has to: S_K = (1 − λ) I
    case.floats, rows, gaps = True, None, []
    for beta in (0.02, 0.01):
        rows = rows or draw_rows(case, 4)
        S_K = (1.0 - IKFAC.damping) * np.eye(case.d)
        for A, _ in rows:
            a = case.numpy(A)
            S_K = (1.0 - beta) * S_K + beta * a.T @ a / len(a)
        K = case.numpy(run(case, rows, IKFAC, beta).K)
        gaps.append(np.max(np.abs(K @ K.T - np.linalg.inv(S_K + IKFAC.damping * np.eye(case.d)))))
    require_second_order(case, gaps, K @ K.T)


@law(backends=_EAGER, dtypes=("float64",), examples=3, sizes=(4,), floats=False)
def dense_tril_and_triu_agree_to_second_order(case: Case) -> None:
    """Where Π̂(M) + Π̂(M)ᵀ is 2 M, K Kᵀ and C Cᵀ of SINGD are as with dense factors + O(β₁²)."""
    # K and C determine each other: a pattern may depend on the side
    if case.S is Dense or not all(keeps_symmetric_parts(case.S, d) for d in (case.d, case.d_out)):
        return
    case.floats, rows = True, draw_rows(case, 4)
    dense = dataclasses.replace(case, S=Dense)
    runs = [[run(c, rows, SINGD, beta) for c in (case, dense)] for beta in (0.004, 0.002)]
    for name in ("K", "C"):
        gaps = []
        for ours, theirs in runs:
            L, D = case.numpy(getattr(ours, name)), case.numpy(getattr(theirs, name))
            gaps.append(float(np.max(np.abs(L @ L.T - D @ D.T))))
        require_second_order(case, gaps, D @ D.T)


@law(backends=_EAGER, examples=3, sizes=(4,))
def update_of_a_stack_equals_a_loop(case: Case) -> None:
    """A refresh of stacked factors is the stack of their refreshes, also where one has no rows."""
    stacks = [(A, B * case.to([[[1.0]], [[0.0]]])) for A, B in draw_rows(case, 2, (2,))]
    for s in (SINGD, settings("normalized")):
        found = run(case, stacks, s, batch=(2,))
        for i in range(2):
            alone = run(case, [(A[i, ...], B[i, ...]) for A, B in stacks], s)
            case.near_entry(i, found, alone)


@law(backends=("numpy", "torch", "cupy"), dtypes=("float64", "float32"), examples=3, sizes=(1, 4))
def update_stays_positive_definite(case: Case) -> None:
    """Under the default bounds K Kᵀ stays positive definite for rows of any scale, 1e±6 too."""
    case.floats = True
    rows = draw_rows(case, 6)
    for scales in ((1e6, 1e-6), (1e-6, 1e6), (1e6, 1.0), (1.0, 1e-6)):
        # the scale changes from step to step, the hardest case
        scaled = [(A * scales[t % 2], B * scales[1 - t % 2]) for t, (A, B) in enumerate(rows)]
        with np.errstate(over="ignore"):  # ‖m‖² leaves float32; the step is then 0
            factors = run(case, scaled, settings("normalized"))
        for name in ("K", "C"):
            dense = case.numpy(getattr(factors, name))
            require(bool(np.all(np.isfinite(dense))), f"{name} is not finite at scales {scales}")
            values = np.linalg.svd(dense, compute_uv=False)
            # at a condition of 1/eps a rounded matrix may as well be singular
            require(values[-1] > 0.0, f"{name} is singular at scales {scales}")
            # each factor I − β m keeps the sign while β‖m‖ < 1: without, K passed through singular
            require(np.linalg.slogdet(dense)[0] > 0.0, f"{name} was singular at scales {scales}")


@law(backends=_EAGER, examples=3, sizes=(1, 4))
def rows_in_any_order_and_number(case: Case) -> None:
    """Permuting the rows, or splitting them into micro-batches, changes no measured curvature."""
    A, B = case.numbers("A", 4, case.d), case.numbers("B", 4, case.d_out)
    whole = measured(case, [(case.to(A), case.to(B))])
    variants = {
        "reversed rows": [(case.to(A[::-1]), case.to(B[::-1]))],
        "micro-batches": [(case.to(A[:1]), case.to(B[:1])), (case.to(A[1:]), case.to(B[1:]))],
    }
    for what, rows in variants.items():
        for one, other in zip(whole, measured(case, rows), strict=True):
            old = case.numpy(one.S)
            scale = 4.0 * float(np.max(np.abs(old), initial=0.0)) + 4.0
            case.near(other.S, old, scale, what)
            case.near(other.squares, one.squares, scale, what)


@law(backends=_EAGER, dtypes=("float64", "float32"), examples=3, sizes=(1, 4))
def loss_scaled_by_a_power_of_two(case: Case) -> None:
    """With relative damping, 64 times the loss divides C by 64, and changes nothing else."""
    case.floats = True
    rows, s = draw_rows(case, 3), settings("normalized")
    if not any(np.any(case.numpy(A)) and np.any(case.numpy(B)) for A, B in rows):
        return  # without rows C stays the identity
    once = run(case, rows, s)
    more = run(case, [(A, B * 64.0) for A, B in rows], s)
    case.equal(more.K, once.K, "K")
    case.same(more.C, lambda C: C / 64.0, once.C, exact=False)
