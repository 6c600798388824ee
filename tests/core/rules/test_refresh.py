"""A refresh under every pair of settings follows the mathematics page, sections 2, 3 and 5."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from singd_core import rules, settings, structures
from singd_core.curvature import Curvature
from singd_core.rules.factor_step import stepped
from singd_core.structures import Dense, TrilToeplitz, choose

D_IN, D_OUT, N = 4, 3, 10
BETA, ALPHA1, DAMPING, BOUND = 0.3, 0.6, 0.2, 0.4

# The other value of each setting that a refresh reads.
SWITCHES: dict[str, Any] = {
    "relative_damping": True,
    "scaled_start": True,
    "early_averaging": True,
    "factor_bound": BOUND,
    "normalize_lr_cov": True,
    "order": 3,
}
RULES: dict[str, dict[str, Any]] = {
    "singd": {"kfac_like": False, "alpha1": ALPHA1},
    "ikfac": {"kfac_like": True},
    "kfac": {"kfac": True},
}
PAIRS = [(), *((name,) for name in SWITCHES), *itertools.combinations(SWITCHES, 2), (*SWITCHES,)]


class Page:
    """The factors of one layer as the page writes them: dense matrices in NumPy."""

    def __init__(self, rule: str, on: tuple[str, ...], structure: str) -> None:
        self.rule, self.on, self.k = rule, on, 0
        self.K, self.C = np.eye(D_IN), np.eye(D_OUT)
        self.m_K, self.m_C = 0.0 * self.K, 0.0 * self.C
        self.t_U = self.t_G = 0.0
        S = structures.get(structure)
        self.project = lambda M: np.asarray(S.project(M).dense())

    def refresh(self, A: np.ndarray, B: np.ndarray) -> None:
        U, G = A.T @ A / N, N * B.T @ B
        w = max(1 / (self.k + 1), BETA)
        self.t_U += w * (np.trace(U) / D_IN - self.t_U)
        self.t_G += w * (np.trace(G) / D_OUT - self.t_G)
        lam_K = lam_C = DAMPING
        if "relative_damping" in self.on:
            lam_K, lam_C = DAMPING * self.t_U, DAMPING * self.t_G
        beta = BETA
        if "early_averaging" in self.on:
            beta = max(BETA, min(0.5, 1 / (self.k + 1)))
        if "scaled_start" in self.on and self.k == 0:
            sign = 1.0 if self.rule == "kfac" else -0.5
            self.K = (self.t_U + lam_K) ** sign * self.K
            self.C = (self.t_G + lam_C) ** sign * self.C
        self.k += 1
        if self.rule == "kfac":
            self.K, self.C = (1 - beta) * self.K + beta * U, (1 - beta) * self.C + beta * G
            self.lam_K, self.lam_C = lam_K, lam_C
            return
        H_K, H_C = self.project(self.K.T @ U @ self.K), self.project(self.C.T @ G @ self.C)
        KK, CC = self.project(self.K.T @ self.K), self.project(self.C.T @ self.C)
        h_K = h_C = 1.0
        alpha1 = 0.0
        if self.rule == "singd":
            alpha1 = ALPHA1
            lam = DAMPING * self.t_U * self.t_G if "relative_damping" in self.on else DAMPING
            h_K, h_C = np.trace(H_C) / D_OUT, np.trace(H_K) / D_IN
            lam_K, lam_C = lam * np.trace(CC) / D_OUT, lam * np.trace(KK) / D_IN
        part = 1 - alpha1 if "normalize_lr_cov" in self.on else 1.0
        self.m_K = alpha1 * self.m_K + 0.5 * part * (h_K * H_K + lam_K * KK - np.eye(D_IN))
        self.m_C = alpha1 * self.m_C + 0.5 * part * (h_C * H_C + lam_C * CC - np.eye(D_OUT))
        self.K, self.C = self.moved(self.K, self.m_K, beta), self.moved(self.C, self.m_C, beta)

    def moved(self, K: np.ndarray, m: np.ndarray, beta: float) -> np.ndarray:
        if "normalize_lr_cov" in self.on:
            beta /= max(1.0, np.max(np.abs(m)))
        if "factor_bound" in self.on:
            beta = min(beta, BOUND / np.linalg.norm(m))
        X, terms = -beta * m, [np.eye(len(m))]
        for j in range(1, 1 + (3 if "order" in self.on else 1)):
            terms.append(terms[-1] @ X / j)
        return K @ sum(terms)


def curvatures(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows whose curvature grows, so that bounds bind and the traces are far from 1."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((N, D_IN)) * (2 + k), rng.standard_normal((N, D_OUT)) * (1 + k) / N)
        for k in range(n)
    ]


def after(rule: str, on: tuple[str, ...], structure: str) -> tuple[Any, Page]:
    """The factors after three refreshes, ours and the page's."""
    given = RULES[rule] | {name: SWITCHES[name] for name in on}
    s = settings("paper", lr_cov=BETA, damping=DAMPING, **given)
    S, like, page = structures.get(structure), np.zeros(0), Page(rule, on, structure)
    ours = rules.start((S, S), ((), D_OUT, D_IN), s, like, like)
    for A, B in curvatures(3):
        inputs, outputs = ours.measure(A, B)
        ours = ours.refresh(Curvature.of(inputs, N, outputs, N), BETA, s)
        page.refresh(A, B)
    return ours, page


def assert_close(ours: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours.dense(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("on", PAIRS, ids=lambda on: "+".join(on) or "none")
@pytest.mark.parametrize("structure", ["dense", "tril", "hierarchical:1,1"])
@pytest.mark.parametrize("rule", ["singd", "ikfac"])
def test_the_inverse_free_refresh_is_the_page(
    rule: str, structure: str, on: tuple[str, ...]
) -> None:
    ours, page = after(rule, on, structure)
    assert_close(ours.K, page.K)
    assert_close(ours.C, page.C)


@pytest.mark.parametrize("on", PAIRS, ids=lambda on: "+".join(on) or "none")
def test_the_refresh_of_kfac_is_the_page(on: tuple[str, ...]) -> None:
    ours, page = after("kfac", on, "dense")
    assert_close(ours.S_K, page.K)
    assert_close(ours.S_C, page.C)
    assert_close(ours.P_K, np.linalg.inv(page.K + page.lam_K * np.eye(D_IN)))
    assert_close(ours.P_C, np.linalg.inv(page.C + page.lam_C * np.eye(D_OUT)))


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("rule", RULES)
def test_each_setting_bites(rule: str, name: str) -> None:
    """Else the tests above would prove nothing of it."""
    if rule == "kfac" and name in ("factor_bound", "normalize_lr_cov", "order"):
        return  # of the inverse-free update alone
    with_it, without = after(rule, (name,), "dense")[0], after(rule, (), "dense")[0]
    assert not np.allclose(with_it.precondition(np.ones((D_OUT, D_IN))),
                           without.precondition(np.ones((D_OUT, D_IN))), rtol=1e-3)  # fmt: skip


@pytest.mark.parametrize("overflow", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("rule", ["singd", "ikfac"])
def test_a_factor_whose_curvature_left_the_range_shrinks(rule: str, overflow: float) -> None:
    """An entry that overflows is infinite or NaN, by the order of its sum."""
    s = settings("normalized", **RULES[rule])
    like = np.zeros(0, dtype=np.float32)
    old = rules.start((Dense, Dense), ((), D_OUT, D_IN), s, like, like)
    for A, B in curvatures(2):
        inputs, outputs = old.measure(A.astype(like.dtype), B.astype(like.dtype))
        found = Curvature.of(inputs, N, outputs, N)
        old = old.refresh(found, BETA, s)
    G = np.full_like(found.H_C.dense(), np.inf)
    G[0, 1] = G[1, 0] = overflow
    with np.errstate(invalid="ignore"):  # inf times 0
        new = old.refresh(dataclasses.replace(found, H_C=Dense(G)), BETA, s)
    for factor in (new.K, new.C):
        assert np.all(np.isfinite(factor.dense()))
    assert new.C.norm() < 1e-6 * old.C.norm()


# ---- what a start and a choice must not do ------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_start_of_an_infinite_curvature_is_no_error(order: int) -> None:
    """It is the number 0 where a frontend has numbers, and the step that follows is left out."""
    one = Dense(np.eye(3))
    found = stepped(one, one, 0.0, 0.0, settings("normalized", order=order))
    assert not np.any(found.dense())


def test_auto_blocks_end_where_there_would_be_more_than_sixteen() -> None:
    b = 5
    for d, expected in ((b, "dense"), (b + 1, "blockdiagonal:5"), (16 * b, "blockdiagonal:5"),
                        (16 * b + 1, "diagonal")):  # fmt: skip
        K, _ = choose.resolve(f"auto:{b}", ((), 1, d))
        assert K.name == expected, d


@pytest.mark.parametrize("rule", RULES)
def test_factors_in_bfloat16_on_numpy_stay_in_it(rule: str) -> None:
    """Python numbers promote the bfloat16 of ml_dtypes."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    like = np.zeros(0, dtype=bfloat16)
    s, pairs = settings("paper", **RULES[rule]), [(Dense, Dense)]
    if rule != "kfac":
        hierarchical, blocks = map(structures.get, ("hierarchical:1,1", "blockdiagonal:2"))
        pairs += [(TrilToeplitz, TrilToeplitz), (hierarchical, blocks)]
    for pair in pairs:
        factors = rules.start(pair, ((), 3, 4), s, like, like)
        own = [a for name, a in factors.named_arrays() if not name.startswith("averages")]
        assert {a.dtype for a in own} == {like.dtype}
