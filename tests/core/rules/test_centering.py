"""Steps of a weight and its bias that are without the mean of the inputs: section 6 of the page."""

import math
from typing import Any

import numpy as np
import pytest
from backends import WIDE, Backend
from cases import cases

from singd_core import Optimizer
from singd_core.rules.centering import NOISE, InputMean, InputSums
from singd_core.without_mean import OF_BIAS

D_OUT, D_IN = 4, 6
# Relative, float64: the page writes the products in another order.
CLOSE = 1e-10


def gradients(n: int, *, shift: Any = 0.0, batch: int = 16, seed: int = 0) -> list[Any]:
    """The gradients of weight and bias of a linear layer whose inputs have a mean."""
    rng, found = np.random.default_rng(seed), []
    mean = 2.0 * np.cos(np.arange(D_IN)) + shift
    for _ in range(n):
        x = mean + rng.standard_normal((batch, D_IN))
        g = rng.standard_normal((batch, D_OUT)) + rng.standard_normal(D_OUT)
        found.append(((g.T @ x) / batch, g.mean(0)))
    return found


def start() -> tuple[Any, Any]:
    rng = np.random.default_rng(7)
    return rng.standard_normal((D_OUT, D_IN)), rng.standard_normal(D_OUT)


def run(optimizer: Optimizer, given: Any, p: Any) -> tuple[Any, Any, list[Any]]:
    """The parameter and the state after steps with these gradients, and all changes."""
    state, changes = optimizer.init({"p": p}), []
    for each in given:
        update, state = optimizer.update({"p": each}, state, {"p": p})
        p = optimizer.apply({"p": p}, update)["p"]
        changes.append(update["p"])
    return p, state, changes


class Page:
    """Section 6 of the mathematics page for diagonal factors, written out, with one refresh a step.

    The size of the step and the levels are left to section 5: a step of W is compared by its
    direction, and a step of b by what it is beside a step of W.
    """

    def __init__(self) -> None:
        self.mu, self.D, self.k = np.zeros(D_IN), 0.0, 0

    def center(self, G: Any, g: Any, lr_cov: float) -> Any:
        w, own = max(1.0 / (self.k + 1), lr_cov), g @ g
        hat = G.T @ g / own
        assert own > 2.0**-16 * np.sum((G - np.outer(g, hat)) ** 2)
        self.D += w * (own - self.D)
        self.mu = self.mu + w * own / self.D * (hat - self.mu)
        self.k += 1
        return G - np.outer(g, self.mu)


def test_the_mean_is_that_of_the_page() -> None:
    optimizer, page = Optimizer({}, T=1, lr_cov=0.2), Page()
    p, state = start(), None
    state = optimizer.init({"p": p})
    for G, g in gradients(12):
        page.center(G, g, 0.2)
        _, state = optimizer.update({"p": (G, g)}, state, {"p": p})
        np.testing.assert_allclose(
            state.layers["p"].factors.inputs.mean, page.mu, rtol=CLOSE, atol=CLOSE
        )


def test_factors_are_of_gradients_without_the_mean() -> None:
    """The same as the factors of a weight alone that has the centered gradients."""
    page, s = Page(), {"T": 1, "lr_cov": 0.2, "structures": "diagonal"}
    given = gradients(8)
    alone = [page.center(G, g, 0.2) for G, g in given]
    W, b = start()
    _, both, changes = run(Optimizer({}, **s), given, (W, b))
    _, plain, expected = run(Optimizer({}, **s), alone, W)
    for name in ("K", "C"):
        found = getattr(both.layers["p"].factors, name).dense()
        np.testing.assert_allclose(found, getattr(plain.layers["p"].factors, name).dense(), CLOSE)
    for (change, _), other in zip(changes, expected, strict=True):
        np.testing.assert_allclose(change, other, rtol=1e-8, atol=1e-12)


def test_a_bias_steps_by_its_share_and_makes_up_for_the_mean() -> None:
    """Diagonal factors: P_C g, balanced, is g by the roots of P_C, times the levels of the rows.

    Without momentum a bias steps as far as a column of its weight does on average, times its share.
    """
    page, s = Page(), {"T": 1, "lr_cov": 0.2, "structures": "diagonal", "momentum": 0.0}
    optimizer, p = Optimizer({}, **s), start()
    state = optimizer.init({"p": p})
    for G, g in gradients(8):
        page.center(G, g, 0.2)
        old = state
        update, state = optimizer.update({"p": (G, g)}, state, {"p": p})
        dW, db = update["p"]
        factors, levels = state.layers["p"].factors, old.layers["p"].factors.levels
        n = np.diag(factors.C.dense()) * g * (levels.rows + 0.1) ** -0.5
        n *= OF_BIAS * np.linalg.norm(dW) / math.sqrt(D_IN) / np.linalg.norm(n)
        np.testing.assert_allclose(db, -n - dW @ page.mu, rtol=1e-8, atol=1e-12)


# JAX compiles each operation of its uncompiled steps
@pytest.mark.parametrize("structures", cases(["dense", "diagonal", "tril"], fast=["diagonal"]))
@pytest.mark.parametrize(
    ("backend", "dtype"), cases(WIDE, fast=[one for one in WIDE if one[0].name != "jax"]), ids=str
)
def test_a_shift_of_the_inputs_changes_no_step(
    backend: Backend, dtype: str, structures: str
) -> None:
    """The layer is the same function, with b - W s for b: all steps are the same but for that."""
    s, found = 3.0 * np.sin(np.arange(D_IN)), []
    with backend.active():
        for shift in (0.0 * s, s):
            W, b = start()
            p = backend.to(W, dtype), backend.to(b - W @ shift, dtype)
            given = [
                (backend.to(G, dtype), backend.to(g, dtype)) for G, g in gradients(20, shift=shift)
            ]
            (W, b), state, _ = run(Optimizer({}, structures=structures), given, p)
            mean = backend.back(state.layers["p"].factors.inputs.mean) - shift
            W, b = backend.back(W), backend.back(b)
            found.append((W, b + W @ shift, mean))
    close = 1e-9 if dtype == "float64" else 2e-3  # the steps multiply what rounding begins with
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=close, atol=close)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_changes_no_step(scale: float) -> None:
    given = gradients(20)
    scaled = [(G * scale, g * scale) for G, g in given]
    for a, b in zip(
        *(run(Optimizer({}), each, start())[0] for each in (given, scaled)), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-8)


def test_gradients_tell_the_mean_of_inputs() -> None:
    _, state, _ = run(Optimizer({}), gradients(300, batch=64), start())
    np.testing.assert_allclose(
        state.layers["p"].factors.inputs.mean, 2.0 * np.cos(np.arange(D_IN)), atol=0.2
    )


def test_a_bias_has_an_agreement_of_its_own() -> None:
    """Where its gradients agree, and those of its weight do not, it steps farther."""
    found = []
    for of_bias in (0.0, 1.0):
        rng = np.random.default_rng(0)
        given = [
            (rng.standard_normal((D_OUT, D_IN)), of_bias + 0.1 * rng.standard_normal(D_OUT))
            for _ in range(30)
        ]
        _, state, _ = run(Optimizer({}, structures="diagonal"), given, start())
        late = state.layers["p"].late
        assert late is not None
        assert late.growth.shape == (2,)
        found.append(late.growth)
    noise, agrees = found
    assert agrees[0] < 0.5
    assert agrees[1] > max(noise[1], 1.0)


@pytest.mark.parametrize("n", [1, 30])
def test_inputs_that_are_the_same_in_all_examples_are_left_as_they_are(n: int) -> None:
    """All of the gradient is of the mean then, and rounding is what would be left of it."""
    rng, x = np.random.default_rng(0), 1.0 + np.arange(D_IN)
    given = [(np.outer(g, x), g) for g in rng.standard_normal((n, D_OUT))]
    (W, _), state, changes = run(Optimizer({}, structures="diagonal"), given, start())
    assert state.layers["p"].factors.inputs.used == 0.0
    rows = np.linalg.svd(W - start()[0])[1]
    assert rows[1] < 1e-6 * rows[0] or n > 1  # one gradient has one direction
    assert all(np.linalg.norm(dW) > 1e-3 for dW, _ in changes)


@pytest.mark.parametrize("share", [0.0, 0.5 * NOISE])
def test_rounding_in_the_gradient_of_a_bias_tells_no_mean(share: float) -> None:
    """As of a layer that is normalized afterwards, and of the keys of attention."""
    rng, given = np.random.default_rng(0), []
    for _ in range(20):
        G, g = rng.standard_normal((D_OUT, D_IN)), rng.standard_normal(D_OUT)
        rest = np.linalg.norm(G - np.outer(g, G.T @ g) / (g @ g))
        given.append((G, share * rest / np.linalg.norm(g) * g))
    (_, b), state, _ = run(Optimizer({}), given, start())
    assert not np.any(state.layers["p"].factors.inputs.mean)
    assert state.skipped == 0
    assert np.all(np.isfinite(b))


@pytest.mark.parametrize("share", [1e-7, 1e-3, 1.0])
def test_a_gradient_of_rank_one_is_compared_with_itself(share: float) -> None:
    """As of two scores, where the loss knows their difference alone: G − g μᵀ is nothing."""
    rng, given = np.random.default_rng(0), []
    x = rng.standard_normal(D_IN)
    for _ in range(20):
        v = rng.standard_normal(D_OUT)
        given.append((np.outer(v, x) / np.linalg.norm(x), share * v))
    (W, b), state, _ = run(Optimizer({}), given, start())
    mean = state.layers["p"].factors.inputs.mean
    expected = x / np.linalg.norm(x) if share == 1.0 else 0.0
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12)
    assert np.max(np.abs(b)) < 100.0
    assert np.all(np.isfinite(W))


def test_a_stack_does_as_its_matrices_do() -> None:
    """Also where one has no gradient, and one a bias without any."""
    each = [gradients(10, seed=i) for i in range(4)]
    each[1] = [(0.0 * G, 0.0 * g) for G, g in each[1]]
    each[2] = [(G, 0.0 * g) for G, g in each[2]]
    given = [
        (np.stack([G for G, _ in step]), np.stack([g for _, g in step]))
        for step in zip(*each, strict=True)
    ]
    W, b = start()
    p = np.stack([W] * 4)[:3], np.stack([b] * 4)[:3]
    given = [(G[:3], g[:3]) for G, g in given]  # the shortest axis counts matrices
    (found, of_bias), _, _ = run(Optimizer({}), given, p)
    for i in range(3):
        (
            alone,
            own,
        ) = run(Optimizer({}), each[i], (W, b))[0]
        np.testing.assert_allclose(found[i], alone, rtol=1e-9)
        np.testing.assert_allclose(of_bias[i], own, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("of_bias", [False, True])
def test_what_is_not_finite_changes_nothing(bad: float, of_bias: bool) -> None:
    optimizer, p = Optimizer({}), start()
    _, before = optimizer.update({"p": gradients(1)[0]}, optimizer.init({"p": p}), {"p": p})
    G, g = gradients(2)[1]
    (g if of_bias else G)[..., 0] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        update, after = optimizer.update({"p": (G, g)}, before, {"p": p})
    assert after.skipped == 1
    assert not any(np.any(part) for part in update["p"])
    for (name, new), (_, old) in zip(after.named_arrays(), before.named_arrays(), strict=True):
        if name != "skipped":
            np.testing.assert_array_equal(new, old, err_msg=name)


def test_a_bias_that_tells_nothing_leaves_the_mean_as_it_is() -> None:
    rng = np.random.default_rng(0)
    inputs = InputMean(rng.standard_normal(D_IN), np.asarray(2.0), np.asarray(1.0))
    for own in (1e-12, math.nan):
        sums = InputSums(rng.standard_normal(D_IN), np.asarray(own), np.asarray(1.0))
        with np.errstate(all="ignore"):
            new = inputs.told(sums, 3.0, 0.1)
        for (name, a), (_, b) in zip(inputs.named_arrays(), new.named_arrays(), strict=True):
            assert np.array_equal(a, b), name


def test_sums_of_parts_add_up() -> None:
    (G, g), *_ = gradients(1)
    like = np.zeros(D_IN)
    whole = InputSums.of(G, g[:, None], like)
    halves = [InputSums.of(G[j], g[j][:, None], like) for j in (slice(0, 2), slice(2, None))]
    for name, one, *two in zip(whole._fields, whole, *halves, strict=True):
        np.testing.assert_allclose(one, sum(two), err_msg=name)
    assert InputMean.zeros((), D_IN, like).told(whole, 0.0, 1.0).mean.shape == (D_IN,)


def test_a_tuple_that_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        Optimizer({}).init({"p": (np.ones((4, 3)), np.ones(5))})
