"""Theorem 1 of the paper: IKFAC keeps K Kᵀ = (S_K + λI)⁻¹ + O(β₁²), and C likewise."""

from typing import Any

import numpy as np
import pytest

from singd_core import Settings, rules, settings
from singd_core.curvature import Curvature
from singd_core.structures import get
from singd_core.testing import Backend, backends

STEPS, LAMBDA, D_IN, D_OUT = 5, 0.1, 7, 6
BETAS = [1e-3, 5e-4, 2.5e-4, 1.25e-4]

# The gap is a β² + b β³ + …, so halving β divides it by 4 (1 + ½ β b/a + …). Each step's error is
# carried on by at most STEPS further ones that change K Kᵀ by a share β ‖U‖ each, and ‖U‖ ≤ 5 here
# (scales of 1.5, squared, times (1 + √(7/30))²): |b/a| ≤ 25, and the ratio misses 4 by up to 50 β.
# Rounding adds 1e-15 to gaps of 1e-7.
SLOPE = 50.0


def curvatures(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of inputs and of output gradients, of other scales in each step."""
    rng = np.random.default_rng(seed)
    shapes = (30, D_IN), (30, D_OUT)
    return [
        tuple(rng.standard_normal(shape) * rng.uniform(0.5, 1.5, shape[1]) for shape in shapes)
        for _ in range(STEPS)
    ]


def gaps(rows: list[tuple[np.ndarray, np.ndarray]], s: Settings, backend: Backend) -> Any:
    """‖K Kᵀ − (S_K + λI)⁻¹‖ and ‖C Cᵀ − (S_C + λI)⁻¹‖ after all rows; S as NumPy says."""
    like = backend.to(np.zeros(1), "float64")
    dense = get("dense")
    factors = rules.start((dense, dense), ((), D_OUT, D_IN), s, like, like)
    S_K, S_C = ((1.0 - LAMBDA) * np.eye(d) for d in (D_IN, D_OUT))  # so that S + λI = I = K Kᵀ
    for A, B in rows:
        inputs, outputs = factors.measure(*(backend.to(x, "float64") for x in (A, B)))
        curvature = Curvature.of(inputs, len(A), outputs, 1.0 / len(B))
        factors = factors.refresh(curvature, s.lr_cov, s)
        S_K = (1.0 - s.lr_cov) * S_K + s.lr_cov * A.T @ A / len(A)
        S_C = (1.0 - s.lr_cov) * S_C + s.lr_cov * B.T @ B / len(B)
    found = []
    for L, S in ((factors.K, S_K), (factors.C, S_C)):
        L = backend.back(L.dense())
        found.append(np.linalg.norm(L @ L.T - np.linalg.inv(S + LAMBDA * np.eye(len(S)))))
    return np.array(found)


def ikfac(beta: float, order: int = 1) -> Settings:
    return settings("paper", kfac_like=True, damping=LAMBDA, lr_cov=beta, order=order)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", backends(), ids=str)
def test_halving_beta_quarters_the_gap(backend: Backend, seed: int, order: int) -> None:
    if "float64" not in backend.dtypes:
        pytest.skip("no float64")
    rows = curvatures(seed)
    with backend.active():
        found = [gaps(rows, ikfac(beta, order), backend) for beta in BETAS]
    for beta, gap, half in zip(BETAS, found, found[1:], strict=False):
        assert np.all(np.abs(gap / half - 4.0) < SLOPE * beta)


@pytest.mark.parametrize("seed", range(4))
def test_the_second_order_closes_a_third_of_the_gap(seed: int) -> None:
    """With X = Kᵀ (U + λI) K − I, and K Kᵀ exact before the step, Expm(−β m)² has the β² term

    ¼ X² at order 1 and ½ X² at order 2, where the inverse of I + β X has X²: gaps of ¾ and ½.
    """
    numpy, rows, beta = backends()[0], curvatures(seed), BETAS[-1]
    first, second = (gaps(rows, ikfac(beta, order), numpy) for order in (1, 2))
    np.testing.assert_allclose(second / first, 2 / 3, atol=SLOPE * beta)


def test_the_adaptive_update_is_not_kfac() -> None:
    """So that the theorem is not kept by everything: with INGD the gap is of first order in β."""
    numpy, rows = backends()[0], curvatures(0)
    given = {"damping": LAMBDA, "alpha1": 0.0}
    one, half = (gaps(rows, settings("paper", lr_cov=b, **given), numpy) for b in BETAS[:2])
    assert np.all(np.abs(one / half - 2.0) < SLOPE * BETAS[0])
