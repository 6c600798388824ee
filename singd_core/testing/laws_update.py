"""Laws of the update: K and C of one layer follow the mathematics page, and stay what they are.

K (side d) and C (side d + 1) both have the structure; the oracle is the page's recursion on dense
matrices in NumPy float64, with the structure's Π̂.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from singd_core import preconditioner
from singd_core.settings import Settings, settings
from singd_core.testing.backends import no_host_sync
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.mismatch import require
from singd_core.testing.pytree_jax import register_trees
from singd_core.updates.curvature import Curvature

Rows = tuple[Any, Any]
IKFAC = Settings(kfac_like=True, damping=0.25, lr_cov=0.125)
SINGD = Settings(alpha1=0.5, damping=0.25, lr_cov=0.125)


def start(case: Case, s: Settings) -> Any:
    """The factors before the first refresh."""
    like = case.to(np.zeros(1))
    return preconditioner.init((case.S, case.S), ((), case.d + 1, case.d), s, like, like)


def draw_rows(case: Case, steps: int, n: int = 3) -> list[Rows]:
    """Inputs, shape (n, d), and output gradients, shape (n, d + 1), for each step."""
    names = [(f"A{t}", f"B{t}") for t in range(steps)]
    return [(case.array(a, n, case.d), case.array(b, n, case.d + 1)) for a, b in names]


def refresh(s: Settings, factors: Any, A: Any, B: Any, lr_cov: Any) -> Any:
    """One refresh, with a sum for the loss."""
    inputs, outputs = factors.measure(A, B)
    return factors.refresh(Curvature.of(inputs, A.shape[-2], outputs, 1), lr_cov, s)


def run(case: Case, rows: Sequence[Rows], s: Settings, lr_cov: Any = None) -> Any:
    """The factors after a refresh with each of the rows; in jax under `jit`."""
    factors, lr_cov = start(case, s), s.lr_cov if lr_cov is None else lr_cov
    one = _jitted(s) if case.backend.library == "jax" else functools.partial(refresh, s)
    for A, B in rows:
        factors = one(factors, A, B, lr_cov)
    return factors


@functools.cache
def _jitted(s: Settings) -> Callable[..., Any]:
    register_trees()
    jitted: Callable[..., Any] = importlib.import_module("jax").jit(functools.partial(refresh, s))
    return jitted


def page(case: Case, rows: Sequence[Rows], s: Settings) -> tuple[np.ndarray, np.ndarray]:
    """K and C by the recursion of section 3, on dense matrices."""

    def project(M: np.ndarray) -> np.ndarray:
        return np.asarray(case.S.project(M).dense())

    beta: Any = s.lr_cov
    lam, alpha1 = s.damping, 0.0 if s.kfac_like else s.alpha1
    K, C = np.eye(case.d), np.eye(case.d + 1)
    m_K, m_C = 0.0 * K, 0.0 * C
    for pair in rows:
        A, B = map(case.numpy, pair)
        H_K, H_C = K.T @ A.T @ A @ K / len(A), C.T @ B.T @ B @ C
        h_K, h_C, lam_K, lam_C = 1.0, 1.0, lam, lam
        if not s.kfac_like:
            h_K, lam_K = np.trace(H_C) / len(C), lam * np.trace(C.T @ C) / len(C)
            h_C, lam_C = np.trace(H_K) / len(K), lam * np.trace(K.T @ K) / len(K)
        m_K = alpha1 * m_K + 0.5 * project(h_K * H_K + lam_K * K.T @ K - np.eye(len(K)))
        m_C = alpha1 * m_C + 0.5 * project(h_C * H_C + lam_C * C.T @ C - np.eye(len(C)))
        K, C = K @ (np.eye(len(K)) - beta * m_K), C @ (np.eye(len(C)) - beta * m_C)
    return K, C


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


@law(backends=("numpy", "strict", "torch", "cupy"), examples=3, sizes=(1, 4))
def update_stays_in_the_structure(case: Case) -> None:
    """After an update K, C and their momenta are members, in the dtype they had."""
    for s in (SINGD, settings("robust")):
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


@law(dtypes=("float64", "float32"), examples=3, sizes=(1, 4), floats=False)
def ikfac_is_kfac_to_second_order(case: Case) -> None:
    """Where Π̂(M) + Π̂(M)ᵀ is 2 M, K Kᵀ of IKFAC is KFAC's (S_K + λI)⁻¹ + O(β₁²) (Theorem 1)."""
    M = np.arange(1.0, 1.0 + case.d**2).reshape(case.d, case.d)
    M = M + M.T
    P = np.asarray(case.S.project(M).dense())
    if not np.allclose(P + P.T, 2.0 * M):
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
    ratio = float(gaps[0] / gaps[1])
    # halving β₁ quarters the gap, up to terms of third order
    require(3.3 < ratio < 4.7, f"halving β₁ divides the gap {gaps[0]:.2g} by {ratio:.2f}, not by 4")


@law(backends=("numpy", "torch", "cupy"), dtypes=("float64", "float32"), examples=3, sizes=(1, 4))
def update_stays_positive_definite(case: Case) -> None:
    """Under the default bounds K Kᵀ stays positive definite for rows of any scale, 1e±6 too."""
    case.floats = True
    rows = draw_rows(case, 6)
    for scales in ((1e6, 1e-6), (1e-6, 1e6), (1e6, 1.0), (1.0, 1e-6)):
        # the scale changes from step to step, the hardest case
        scaled = [(A * scales[t % 2], B * scales[1 - t % 2]) for t, (A, B) in enumerate(rows)]
        with np.errstate(over="ignore"):  # ‖m‖² leaves float32; the step is then 0
            factors = run(case, scaled, settings("robust"))
        for name in ("K", "C"):
            dense = case.numpy(getattr(factors, name))
            require(bool(np.all(np.isfinite(dense))), f"{name} is not finite at scales {scales}")
            values = np.linalg.svd(dense, compute_uv=False)
            # at a condition of 1/eps a rounded matrix may as well be singular
            require(values[-1] > 0.0, f"{name} is singular at scales {scales}")


def _measured(case: Case, rows: Sequence[Rows]) -> tuple[Any, Any]:
    factors = start(case, SINGD)
    total: Any = None
    for A, B in rows:
        new = factors.measure(A, B)
        total = new if total is None else tuple(x + y for x, y in zip(total, new, strict=True))
    return total  # type: ignore[no-any-return]


@law(backends=("numpy", "strict", "torch", "cupy"), examples=3, sizes=(1, 4))
def rows_in_any_order_and_number(case: Case) -> None:
    """Permuting the rows, or splitting them into micro-batches, changes no measured curvature."""
    A, B = case.numbers("A", 4, case.d), case.numbers("B", 4, case.d + 1)
    whole = _measured(case, [(case.to(A), case.to(B))])
    variants = {
        "reversed rows": [(case.to(A[::-1]), case.to(B[::-1]))],
        "micro-batches": [(case.to(A[:1]), case.to(B[:1])), (case.to(A[1:]), case.to(B[1:]))],
    }
    for what, rows in variants.items():
        for one, other in zip(whole, _measured(case, rows), strict=True):
            old = case.numpy(one.S)
            scale = 4.0 * float(np.max(np.abs(old), initial=0.0)) + 4.0
            try:
                case.same(other.S, lambda x: x, old, exact=False, scale=scale)
                case.same(other.squares, lambda x: x, one.squares, exact=False, scale=scale)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None


@law(backends=("numpy", "strict", "torch"), dtypes=("float64", "float32"), examples=3, sizes=(1, 4))
def loss_scaled_by_a_power_of_two(case: Case) -> None:
    """With relative damping, 64 times the loss divides C by 64, and changes nothing else."""
    case.floats = True
    rows, s = draw_rows(case, 3), settings("robust")
    if not any(np.any(case.numpy(A)) and np.any(case.numpy(B)) for A, B in rows):
        return  # without rows C stays the identity
    once = run(case, rows, s)
    more = run(case, [(A, B * 64.0) for A, B in rows], s)
    case.equal(more.K, once.K, "K")
    case.same(more.C, lambda C: C / 64.0, once.C, exact=False)


def whole_update(S: Any, s: Settings) -> Callable[..., Any]:
    """A function of factors, rows and a gradient: one refresh, and the natural gradient."""

    def function(factors: Any, A: Any, B: Any, gradient: Any) -> Any:
        factors = refresh(s, factors, A, B, s.lr_cov)
        return factors, factors.precondition(gradient)

    return function


def update_arguments(case: Case, s: Settings) -> tuple[Any, ...]:
    """What `whole_update` is called with."""
    (A, B), gradient = draw_rows(case, 1)[0], case.array("W", case.d + 1, case.d)
    return start(case, s), A, B, gradient


@law(backends=("strict",), examples=1, sizes=(4,))
def update_does_not_wait(case: Case) -> None:
    """A whole update on a device reads nothing back to the host, and leaves nothing elsewhere."""
    for s in (SINGD, settings("robust")):
        given = update_arguments(case, s)
        with no_host_sync():
            factors, natural = whole_update(case.S, s)(*given)
        for a in (natural, *(a for _, a in factors.named_arrays())):
            require(a.device == given[1].device, f"an array is on {a.device}")
