"""The factors of parameters that show no rows, from their gradients alone."""

from typing import Any

import numpy as np
import pytest

from singd_core import Optimizer, Settings, rules, settings
from singd_core.layers import Tensor
from singd_core.rules.shampoo import Shampoo
from singd_core.structures import get

S = settings()
STRUCTURES = ["dense", "diagonal", "blockdiagonal:3", "tril", "triltoeplitz", "hierarchical:1,2"]

# Relative to the largest entry, float64: the page writes the products in another order.
CLOSE = 1e-11


def start(shape: tuple[int, ...], structure: str = "dense") -> Shampoo:
    *batch, d_out, d_in = shape
    like = np.zeros(0)
    both = get(structure), get(structure)
    found = rules.start(both, (batch, d_out, d_in), S, like, like, has_rows=False)
    assert isinstance(found, Shampoo)
    return found


def trained(
    gradients: Any, structure: str = "dense", lr_cov: float = S.lr_cov, s: Settings = S
) -> Shampoo:
    factors = start(gradients[0].shape, structure)
    for G in gradients:
        factors = factors.refresh(factors.curvature(G), lr_cov, s)
    return factors


def draw(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape))


def correlated(n: int, *shape: int) -> np.ndarray:
    """Gradients whose entries have another variance and correlation along each axis."""
    d_out, d_in = shape
    rng = np.random.default_rng(3)
    left, right = (rng.standard_normal((d, d)) / d**0.5 + np.eye(d) for d in shape)
    return left @ draw(n, d_out, d_in) @ right


class Page:
    """Section 6 of the mathematics page, written out."""

    def __init__(self, d_out: int, d_in: int, structure: str, s: Settings = S) -> None:
        self.s = s
        self.K, self.C, self.k = np.eye(d_in), np.eye(d_out), 0
        self.project = lambda M: np.asarray(get(structure).project(M).dense())

    def refresh(self, G: np.ndarray, lr_cov: float) -> None:
        X, (d_o, d_i) = self.C.T @ G @ self.K, G.shape
        beta = max(lr_cov, min(0.5, 1 / (self.k + 1)))
        new = []
        for L, H in ((self.K, X.T @ X / d_o), (self.C, X @ X.T / d_i)):
            M = self.project(H) + self.s.damping * np.mean(G * G) * self.project(L.T @ L)
            m = 0.5 * (M / np.trace(M) * len(L) - np.eye(len(L)))
            L = L - min(beta, self.s.factor_bound / np.linalg.norm(m)) * L @ m
            new.append(L * (len(L) ** 0.5 / np.linalg.norm(L)))
        (self.K, self.C), self.k = new, self.k + 1


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.max(np.abs(expected)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_refresh_is_that_of_the_page(structure: str) -> None:
    page, factors = Page(5, 7, structure), start((5, 7), structure)
    for i, G in enumerate(correlated(8, 5, 7)):
        G = G * 3.0 ** (i % 3)
        factors = factors.refresh(factors.curvature(G), 0.1, S)
        page.refresh(G, 0.1)
        assert_close(factors.K.dense(), page.K)
        assert_close(factors.C.dense(), page.C)
    assert (factors.averages.k, factors.averages.t_U) == (8, 0)


@pytest.mark.parametrize(
    "given",
    [{"damping": 0.11}, {"factor_bound": 0.4}, {"early_averaging": False}, {"lr_cov": 0.11}],
    ids=str,
)
def test_each_part_of_the_page_bites(given: dict[str, Any]) -> None:
    """Else the test above would prove nothing of it."""
    s = settings(**given)
    factors, page = start((5, 7)), Page(5, 7, "dense")
    for G in correlated(12, 5, 7):
        factors = factors.refresh(factors.curvature(G), given.get("lr_cov", 0.1), s)
        page.refresh(G, 0.1)
    assert np.max(np.abs(factors.K.dense() - page.K)) > 1e-4


def test_they_whiten_gradients() -> None:
    """The covariances of X = Cᵀ G K along its rows and columns are nearly multiples of I."""
    given = correlated(4000, 4, 6)
    factors = trained(given, lr_cov=0.01, s=settings(damping=1e-4))
    X = factors.C.dense().T @ given @ factors.K.dense()
    for axis in (0, 1):
        before, after = (
            np.linalg.cond(np.mean(Y @ Y.mT if axis == 0 else Y.mT @ Y, axis=0)) for Y in (given, X)
        )
        assert before > 20
        assert after < 1.5


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_scale_of_gradients_changes_no_factor(structure: str, scale: float) -> None:
    given = draw(6, 5, 7)
    each = scale ** np.linspace(0.0, 1.0, 6)[:, None, None]  # as they shrink in training
    once = trained(given, structure)
    for other in (trained(given * scale, structure), trained(given * each, structure)):
        for a, b in ((once.K, other.K), (once.C, other.C)):
            assert_close(b.dense(), a.dense())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_stack_is_refreshed_as_its_matrices_are(structure: str) -> None:
    given = draw(5, 3, 4, 6)
    given[:, 1] = 0.0  # nothing is learned of it
    given[:, 2] *= 100.0
    stack = trained(given, structure)
    for i in range(3):
        alone = trained(given[:, i], structure)
        for (_, a), (_, b) in zip(stack.named_arrays(), alone.named_arrays(), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=CLOSE, atol=CLOSE)
    assert np.array_equal(stack.K.dense()[1], np.eye(6))


@pytest.mark.parametrize("jump", [1e-8, 1e8])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_factors_stay_regular_whatever_comes(structure: str, jump: float) -> None:
    given = draw(30, 5, 7)
    given[::3] *= jump
    given[10:13] = 0.0
    factors = trained(given, structure)
    for L in (factors.K, factors.C):
        sign, size = np.linalg.slogdet(L.dense())
        assert sign > 0
        assert np.isfinite(size)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 3), ((), 5, 3)),
        ((64, 32, 3, 3), ((), 64, 288)),  # a kernel of torch
        ((3, 3, 32, 64), ((), 288, 64)),  # and of flax
        ((64, 32, 5), ((), 64, 160)),
        ((48, 4, 12), ((), 48, 48)),  # a projection to heads
        ((8, 32, 64), ((8,), 32, 64)),  # experts
    ],
)
def test_the_matrix_of_a_tensor(shape: tuple[int, ...], expected: Any) -> None:
    kind = Tensor.of(shape)
    assert kind.shape(shape, bias=False) == expected
    for first in ((), (2,)):  # alone, and of equal ones along a first axis
        x = draw(1, *first, *shape)[0]
        M = kind.matrix(x)
        assert M.shape == (*first, *expected[0], *expected[1:])
        assert np.array_equal(kind.split(M, shape, bias=False)[0], x)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_vector_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two axes"):
        Tensor.of(shape)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_changes_no_step(scale: float) -> None:
    found = []
    for c in (1.0, scale):
        optimizer, params = Optimizer({}), {"W": draw(1, 4, 6)[0]}
        state = optimizer.init(params)
        for G in draw(30, 4, 6, seed=1):
            updates, state = optimizer.update({"W": G * c}, state, params)
            params = optimizer.apply(params, updates)
        assert state.skipped == 0
        found.append(params["W"])
    assert_close(*found)


def test_factors_are_refreshed_when_a_refresh_is_due() -> None:
    optimizer, params = Optimizer({}), {"W": np.ones((4, 6))}
    state, due, expected = optimizer.init(params), [], []
    for G in draw(60, 4, 6):
        expected.append(optimizer.due(state))
        before = state.layers["W"].factors.averages.k
        _, state = optimizer.update({"W": G}, state, params)
        due.append(state.layers["W"].factors.averages.k > before)
    assert due == expected
    assert not all(due)


def test_it_learns_what_adamw_learns_slowly() -> None:
    """A quadratic loss whose axes differ by 1e4, from gradients with noise."""
    rng, losses = np.random.default_rng(0), []
    scales = np.logspace(0, -2, 8)[:, None] * np.logspace(0, -2, 6)
    for given in ({}, {"recipe": "paper"}):  # whose matrices are AdamW's
        optimizer, params = Optimizer({}, **given), {"W": rng.standard_normal((8, 6))}
        state = optimizer.init(params)
        for t in range(200):
            G = scales**2 * params["W"]
            updates, state = optimizer.update({"W": G}, state, params)
            params = {"W": params["W"] + updates["W"] * (1 - t / 200)}
        losses.append(np.sum((scales * params["W"]) ** 2))
    assert losses[0] < losses[1] / 100


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (1, 1, 4), (4, 0)])
def test_vectors_are_left_to_adamw(shape: tuple[int, ...]) -> None:
    state = Optimizer({}).init({"p": np.ones(shape)})
    assert set(state.fallback) == {"p"}
