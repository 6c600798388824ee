"""The update of one layer, K (side d) and C (side d_out): the project's, and the page's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from singd_core import rules
from singd_core._settings import Settings
from singd_core.curvature import Curvature
from singd_core.testing.draw import Case
from singd_core.testing.pytree_jax import register_trees

Rows = tuple[Any, Any]
IKFAC = Settings(rule="ikfac", damping=0.25, lr_cov=0.125)
SINGD = Settings(alpha1=0.5, damping=0.25, lr_cov=0.125)


def start(case: Case, s: Settings, batch: tuple[int, ...] = (), *, has_rows: bool = True) -> Any:
    """The factors before the first refresh."""
    like, shape = case.to(np.zeros(1)), (batch, case.d_out, case.d)
    return rules.start((case.S, case.S), shape, s, like, like, has_rows=has_rows)


def draw_rows(case: Case, steps: int, batch: tuple[int, ...] = ()) -> list[Rows]:
    """Inputs, shape (*batch, 3, d), and output gradients, (*batch, 3, d_out), for each step."""
    names = [(f"A{t}", f"B{t}") for t in range(steps)]
    d = case.d
    return [(case.array(a, *batch, 3, d), case.array(b, *batch, 3, case.d_out)) for a, b in names]


def refresh(s: Settings, factors: Any, A: Any, B: Any, lr_cov: Any) -> Any:
    """One refresh, with a sum for the loss."""
    inputs, outputs = factors.measure(A, B)
    return factors.refresh(Curvature.of(inputs, A.shape[-2], outputs, 1), lr_cov, s)


def run(
    case: Case,
    rows: Sequence[Rows],
    s: Settings,
    lr_cov: Any = None,
    batch: tuple[int, ...] = (),
) -> Any:
    """The factors after a refresh with each of the rows; in jax under `jit`."""
    factors, lr_cov = start(case, s, batch), s.lr_cov if lr_cov is None else lr_cov
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
    """K and C by the recursion of the mathematics page, section 3, on dense matrices."""

    def project(M: np.ndarray) -> np.ndarray:
        return np.asarray(case.S.project(M).dense())

    beta: Any = s.lr_cov
    lam, alpha1 = s.damping, 0.0 if s.rule == "ikfac" else s.alpha1
    K, C = np.eye(case.d), np.eye(case.d_out)
    m_K, m_C = 0.0 * K, 0.0 * C
    for pair in rows:
        A, B = map(case.numpy, pair)
        H_K, H_C = K.T @ A.T @ A @ K / len(A), C.T @ B.T @ B @ C
        h_K, h_C, lam_K, lam_C = 1.0, 1.0, lam, lam
        if s.rule != "ikfac":
            h_K, lam_K = np.trace(H_C) / len(C), lam * np.trace(C.T @ C) / len(C)
            h_C, lam_C = np.trace(H_K) / len(K), lam * np.trace(K.T @ K) / len(K)
        m_K = alpha1 * m_K + 0.5 * project(h_K * H_K + lam_K * K.T @ K - np.eye(len(K)))
        m_C = alpha1 * m_C + 0.5 * project(h_C * H_C + lam_C * C.T @ C - np.eye(len(C)))
        K, C = K @ (np.eye(len(K)) - beta * m_K), C @ (np.eye(len(C)) - beta * m_C)
    return K, C


def learn(case: Case, gradients: Sequence[Any], s: Settings, batch: tuple[int, ...] = ()) -> Any:
    """The factors after a refresh with each of the gradients alone."""
    factors = start(case, s, batch, has_rows=False)
    for G in gradients:
        factors = factors.refresh(factors.curvature(G), s.lr_cov, s)
    return factors


def page_of_gradients(
    case: Case, gradients: Sequence[Any], s: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """K and C by the recursion of the mathematics page, section 6, on dense matrices."""
    rate: Any = s.lr_cov
    factors, k = [np.eye(case.d), np.eye(case.d_out)], 0
    for G in map(case.numpy, gradients):
        if not np.any(G):
            continue
        K, C = factors
        X = C.T @ G @ K
        beta: float = max(rate, min(0.5, 1.0 / (k + 1)))
        for i, (L, H) in enumerate(((K, X.T @ X / len(C)), (C, X @ X.T / len(K)))):
            M = H + s.damping * np.mean(G * G) * L.T @ L
            M, n = np.asarray(case.S.project(M).dense()), len(L)
            m = 0.5 * (M * (n / np.trace(M)) - np.eye(n))
            bound = s.factor_bound / max(float(np.linalg.norm(m)), 1e-300)
            L = L - min(beta, bound) * L @ m
            factors[i] = L * (n**0.5 / np.linalg.norm(L))
        k += 1
    return factors[0], factors[1]


def measured(case: Case, rows: Sequence[Rows]) -> tuple[Any, Any]:
    """What the first refresh is told of the rows, added up over micro-batches."""
    factors = start(case, SINGD)
    total: Any = None
    for A, B in rows:
        new = factors.measure(A, B)
        total = new if total is None else tuple(x + y for x, y in zip(total, new, strict=True))
    return total  # type: ignore[no-any-return]
