"""Properties for every side and every parameter of the families, beyond the laws."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singd_core import settings as recipe
from singd_core.curvature import Curvature
from singd_core.rules import start
from singd_core.structures import Dense, Structure, blockdiagonal, get, hierarchical

SIDES = st.integers(1, 12)
PARAMETERS = st.integers(1, 14)
SINGLE = ["dense", "diagonal", "tril", "triu", "triltoeplitz", "triutoeplitz"]
RANK_K = ["trilbottomrightdiag", "triltopleftdiag", "triubottomrightdiag", "triutopleftdiag"]
STRUCTURES = st.one_of(
    st.sampled_from(SINGLE).map(get),
    st.builds(blockdiagonal, PARAMETERS),
    st.builds(lambda name, k: get(f"{name}:{k}"), st.sampled_from(RANK_K), PARAMETERS),
    st.builds(hierarchical, PARAMETERS, PARAMETERS),
)
SEEDS = st.integers(0, 2**32 - 1)

# Relative: sums of at most 12 + 12 terms of similar size, and one FFT, in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def symmetric(rng: np.random.Generator, d: int) -> np.ndarray:
    M = rng.standard_normal((d, d))
    return M + M.T


@given(STRUCTURES, SIDES, SEEDS)
def test_products_stay_in_the_structure(S: type[Structure], d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = (S.restrict(rng.standard_normal((d, d))) for _ in range(2))
    product = A.dense() @ B.dense()
    np.testing.assert_allclose((A @ B).dense(), product, **CLOSE)
    np.testing.assert_allclose(S.restrict(product).dense(), product, **CLOSE)


@given(STRUCTURES, SIDES, SEEDS)
def test_the_projection_obeys_its_law(S: type[Structure], d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    M = symmetric(rng, d)
    P, R = S.project(M).dense(), S.project(symmetric(rng, d)).dense()
    left = np.sum((P + P.T) * (R + R.T)) / 4
    np.testing.assert_allclose(left, np.sum(M * R), rtol=1e-11, atol=1e-11 * np.sum(np.abs(M * R)))


@given(STRUCTURES, SIDES, st.integers(0, 40), SEEDS)
def test_a_congruence_is_the_projection_of_the_product(
    S: type[Structure], d: int, n: int, seed: int
) -> None:
    """Few rows and many are multiplied in different orders."""
    rng = np.random.default_rng(seed)
    L, X = S.restrict(rng.standard_normal((d, d))), rng.standard_normal((d, n))
    Y = L.dense().T @ X
    scale = max(1.0, float(np.abs(Y @ Y.T).max()))
    np.testing.assert_allclose(
        L.congruence(X).dense(), S.project(Y @ Y.T).dense(), rtol=0, atol=1e-12 * scale
    )


@given(STRUCTURES, STRUCTURES, SIDES, SIDES, SEEDS)
@settings(max_examples=50)
def test_a_refresh_is_the_projected_recursion(
    S_K: type[Structure], S_C: type[Structure], d_in: int, d_out: int, seed: int
) -> None:
    """IKFAC on the rows equals K (I − β/2 Π̂(Kᵀ(U + λI)K − I)) in dense matrices."""
    rng, s, like = np.random.default_rng(seed), recipe("paper", kfac_like=True), np.zeros(1)
    factors = start((S_K, S_C), ((), d_out, d_in), s, like, like)
    K, C = np.eye(d_in), np.eye(d_out)
    for _ in range(3):
        A, B = rng.standard_normal((7, d_in)), rng.standard_normal((7, d_out))
        inputs, outputs = factors.measure(A, B)
        factors = factors.refresh(Curvature.of(inputs, 7, outputs, 2), 0.1, s)
        for S, X, scale, name in ((S_K, A, 1 / 7, "K"), (S_C, B, 2.0, "C")):
            L = K if name == "K" else C
            damped = scale * X.T @ X + s.damping * np.eye(len(L))
            m = S.project(L.T @ damped @ L).dense() - np.eye(len(L))
            L = L - 0.05 * L @ m
            K, C = (L, C) if name == "K" else (K, L)
    np.testing.assert_allclose(factors.K.dense(), K, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(factors.C.dense(), C, rtol=1e-9, atol=1e-9)


@given(SIDES, SEEDS, st.floats(1e-6, 1e6))
def test_any_finite_rows_leave_the_preconditioner_positive_definite(
    d: int, seed: int, scale: float
) -> None:
    rng, s, like = np.random.default_rng(seed), recipe("normalized"), np.zeros(1)
    factors = start((Dense, Dense), ((), d, d), s, like, like)
    for jump in (1.0, scale, 1.0):
        A, B = jump * rng.standard_normal((3, d)), rng.standard_normal((3, d)) / jump
        inputs, outputs = factors.measure(A, B)
        factors = factors.refresh(Curvature.of(inputs, 3, outputs, 3), 0.05, s)
        for L in (factors.K.dense(), factors.C.dense()):
            singular = np.linalg.svd(L, compute_uv=False)
            assert np.all(np.isfinite(singular))
            assert singular[-1] > 0.0
            assert np.linalg.slogdet(L)[0] > 0.0  # it never passed through a singular matrix


@given(STRUCTURES, SIDES)
def test_the_width_is_that_of_the_largest_set_of_entries_that_meet(
    S: type[Structure], d: int
) -> None:
    """Of i, j, ... with all of (i, j) or (j, i) in the pattern; a Toeplitz matrix averages."""
    if "toeplitz" in S.name:
        assert S.width(d) == 1
        return
    pattern = S.restrict(np.ones((d, d))).dense() != 0.0
    meet = pattern | pattern.T
    sets: list[tuple[int, ...]] = [()]
    width = 0
    for i in range(d):  # the sets that end before i, and those with it
        sets += [(*s, i) for s in sets if all(meet[i, j] for j in s)]
    width = max(map(len, sets))
    assert S.width(d) == width


class Named(blockdiagonal(2)):  # type: ignore[misc]
    """A subclass of what a function made, which has a name of its own."""


@pytest.mark.parametrize("cls", [blockdiagonal(4), hierarchical(2, 3), Named, Dense])
def test_the_class_itself_is_pickled(cls: type[Structure]) -> None:
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert copy.deepcopy(cls) is cls
