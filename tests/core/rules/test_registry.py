"""Rules have names, and a new one is chosen by its name in every frontend."""

from typing import Any

import numpy as np
import pytest

from singd_core import Optimizer, rules
from singd_core.rules import registry
from singd_core.structures import Dense, Diagonal


@rules.rule
class Halved(rules.SINGD):
    """SINGD with steps of half the length."""

    title = "halved"

    def directions(self, curvature: Any, rates: Any, s: Any) -> Any:
        return tuple(m.scale(0.5) for m in super().directions(curvature, rates, s))


@rules.rule
class Unused(rules.IKFAC):
    """Factors that precondition nothing."""

    title = "unused"

    def preconditioner(self, T: int, **given: Any) -> Any:
        return lambda gradient: gradient


@pytest.fixture(autouse=True)
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    rules.register("halved", Halved)


def test_names_and_errors() -> None:
    assert rules.names() == ["singd", "ikfac", "kfac", "halved"]
    assert rules.get("halved") is Halved
    rules.register("halved", Halved)  # as a cell of a notebook that runs again
    for name in ("kfac", ""):
        with pytest.raises(ValueError, match="cannot name a rule"):
            rules.register(name, Halved)
    with pytest.raises(TypeError, match="no subclass of Rule"):
        rules.register("other", dict)
    with pytest.raises(TypeError, match="InverseFree leaves out weights: write them"):
        rules.register("other", rules.InverseFree)
    left_out = dict.fromkeys(rules.Rule.__abstractmethods__)
    for given, message in (
        (left_out, "Own leaves out title: write"),
        (left_out | {"title": "own"}, "Own has no fields: write @singd_core.rules.rule above it"),
    ):
        with pytest.raises(TypeError, match=message):
            rules.register("other", type("Own", (rules.Rule,), given))
    with pytest.raises(ValueError, match="there are 'singd', 'ikfac', 'kfac', 'halved'"):
        rules.get("other")


def after(rule: str) -> Any:
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((8, 4)), rng.standard_normal((8, 3)) / 8
    params = {"map": np.zeros((3, 4))}
    optimizer = Optimizer(recipe="paper", rule=rule, alpha1=0.25, lr_cov=0.1)
    state = optimizer.init(params)
    _, state = optimizer.update({"map": g.T @ x}, state, params, {"map": (x, g)})
    return state.layers["map"].factors


def test_a_registered_rule_learns_in_its_own_way() -> None:
    ours, theirs = after("halved"), after("singd")
    assert type(ours) is Halved
    np.testing.assert_allclose(ours.m_K.dense(), theirs.m_K.dense() / 2, rtol=1e-13)
    np.testing.assert_allclose(
        np.eye(4) - ours.K.dense(), (np.eye(4) - theirs.K.dense()) / 2, atol=1e-15
    )


def test_a_step_goes_by_the_preconditioner_of_the_rule() -> None:
    rules.register("unused", Unused)
    rng, params = np.random.default_rng(0), {"map": np.zeros((3, 4))}
    x, g = rng.standard_normal((8, 4)), rng.standard_normal((8, 3)) / 8
    optimizer = Optimizer(recipe="paper", rule="unused")
    gradient = {"map": g.T @ x}
    changes, _ = optimizer.update(gradient, optimizer.init(params), params, {"map": (x, g)})
    ratios = changes["map"] / gradient["map"]
    np.testing.assert_allclose(ratios, ratios[0, 0], rtol=1e-12)


def test_it_is_a_rule_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from singd_torch import SINGD

    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = SINGD(model, recipe="paper", rule="halved", T=1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    assert "halved" in str(optimizer)
    assert "m_K.matrix" in optimizer.state[model.weight]


def test_a_rule_that_derives_from_the_default_keeps_its_rows() -> None:
    class Other(rules.IKFAC):
        pass

    structures = (Diagonal, Diagonal)
    assert not rules.IKFAC.wants_rows(structures)
    assert rules.IKFAC.wants_rows((Diagonal, Dense))
    assert all(rule.wants_rows(structures) for rule in (Other, rules.SINGD, rules.KFAC))


@pytest.mark.slow
def test_it_is_a_rule_of_jax() -> None:
    jax = pytest.importorskip("jax")
    from singd_jax import singd, value_and_grad

    def loss(params: Any, x: Any) -> Any:
        return (x @ params["w"]).mean() ** 2

    params, x = {"w": jax.numpy.ones((4, 3))}, jax.numpy.ones((8, 4))
    tx = singd(1e-2, loss=loss, recipe="paper", rule="halved", T=1)
    state = tx.init(params, x)
    _, grads = value_and_grad(loss)(params, state, x)
    _, state = tx.update(grads, state, params)
    assert type(state.core.layers["w"].factors) is Halved
