"""The optimizer steps as the mathematics page says."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from page import Page

from singd_core import Optimizer, settings
from singd_core.structures import names

PAPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.03, "damping": 0.2, "lr_cov": 0.05}
INGD = PAPER | {"alpha1": 0.6}
NORMALIZED = PAPER | {
    "normalized": True,
    "nesterov": False,
    "warmup": 5,
    "decoupled_weight_decay": False,
    "growing_T": False,
    "T": 3,
    "relative_damping": True,
    "rule": "ikfac",
    "scaled_start": True,
    "early_averaging": True,
    "factor_bound": 0.3,
}
DEFAULTS = dataclasses.asdict(settings("normalized"))
RULES: dict[str, dict[str, Any]] = {
    "kfac": PAPER | {"rule": "kfac"},
    "ingd": INGD | {"rule": "singd"},
    "ikfac": INGD | {"rule": "ikfac"},
    "ingd without Riemannian momentum": PAPER | {"alpha1": 0.0, "rule": "singd"},
}

# Relative, float64: eight steps of small products; the two write them in another order.
CLOSE = 1e-12


def rows(n: int, shrink: float = 1.0) -> list[tuple[np.ndarray, ...]]:
    """Inputs and output gradients of n steps, and the gradient Σ BᵀA that belongs to them.

    Args:
        n: How many steps.
        shrink: By what output gradients are multiplied in each.
    """
    rng = np.random.default_rng(0)
    found = []
    for t in range(n):
        x, B = rng.standard_normal((12, 6)) * 1.5, rng.standard_normal((12, 5)) / 12 * shrink**t
        A = np.concatenate([x, np.ones((12, 1))], axis=1)
        found.append((x, A, B, B.T @ A))
    return found


def compare(
    given: dict[str, Any],
    page: Page,
    structures: tuple[str, str],
    recipe: str,
    steps: int = 8,
    shrink: float = 1.0,
    decay: float = 1.0,
) -> None:
    optimizer = Optimizer(recipe=recipe, structures=structures, **given)
    params: dict[str, Any] = {"map": (page.W[:, :-1], page.W[:, -1])}
    state = optimizer.init(params)
    for x, A, B, grad in rows(steps, shrink):
        pair = {"map": (x, B)} if optimizer.due(state) else None
        grads = {"map": (grad[:, :-1], grad[:, -1])}
        updates, state = optimizer.update(grads, state, params, pair)
        params = optimizer.apply(params, updates)
        W = page.step(grad, A, B)
        if decay != 1.0:
            page.s["lr"] *= decay
            optimizer.settings = dataclasses.replace(optimizer.settings, lr=page.s["lr"])
        weight, bias = params["map"]
        np.testing.assert_allclose(weight, W[:, :-1], rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(bias, W[:, -1], rtol=CLOSE, atol=CLOSE)
    assert state.skipped == 0


def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, 7))


@pytest.mark.parametrize("T", [1, 3], ids="T{}".format)
@pytest.mark.parametrize("rule", RULES)
def test_paper_recipe_is_the_page(rule: str, T: int) -> None:
    given = RULES[rule] | {"T": T}
    compare(given, Page(weights(), **given), ("dense", "dense"), "paper")


PARAMETERS = {"blockdiagonal": ":3", "hierarchical": ":2,2"}
FAMILIES = [name.partition("[")[0].partition(":")[0] for name in names()]
STRUCTURES = [name + PARAMETERS.get(name, "") for name in FAMILIES]


@pytest.mark.parametrize("rule", ["ingd", "ikfac"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_are_the_page_with_their_projection(structure: str, rule: str) -> None:
    given, both = RULES[rule] | {"T": 1}, (structure, structure)
    compare(given, Page(weights(), both, **given), both, "paper")


@pytest.mark.parametrize("given", [{}, NORMALIZED], ids=["defaults", "other values"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_normalized_recipe_is_the_page(structure: str, given: dict[str, Any]) -> None:
    both = structure, structure
    page = Page(weights(), both, **DEFAULTS | given | {"rule": "normalized"})
    compare(given, page, both, "normalized", steps=45 if not given else 8)


def test_gradients_that_shrink_make_the_steps_of_the_page() -> None:
    given: dict[str, Any] = {"momentum": 0.8}
    both, page = ("dense", "dense"), Page(weights(), **DEFAULTS | given | {"rule": "normalized"})
    compare(given, page, both, "normalized", steps=260, shrink=0.98)


@pytest.mark.parametrize("decay", [0.99, 1.01])
def test_rates_that_change_make_the_steps_of_the_page(decay: float) -> None:
    """A decay to 0.22 of the rate, where steps are shorter by 0.36 to 1 besides; and a growth."""
    both, page = ("dense", "dense"), Page(weights(), **DEFAULTS | {"rule": "normalized"})
    compare({}, page, both, "normalized", steps=150, shrink=0.98, decay=decay)


CHANGED: dict[str, Any] = {
    "lr": 0.2, "momentum": 0.8, "nesterov": True, "warmup": 7, "weight_decay": 0.05,
    "decoupled_weight_decay": True, "T": 2, "growing_T": True, "lr_cov": 0.7, "damping": 0.3,
    "factor_bound": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("setting", CHANGED)
def test_each_setting_of_the_normalized_recipe_bites_there(setting: str) -> None:
    """Else the test above would prove nothing of it."""
    given = NORMALIZED | {setting: CHANGED[setting], "rule": "normalized"}
    page = Page(weights(), **DEFAULTS | given)
    with pytest.raises(AssertionError):
        compare(NORMALIZED, page, ("dense", "dense"), "normalized")


def test_singd_with_dense_factors_is_ingd_whatever_the_structure_is_called() -> None:
    """One block, or a hierarchical matrix with one dense block, is dense."""
    runs = []
    for name in ("dense", "blockdiagonal:7", "hierarchical:7,1"):
        optimizer = Optimizer(recipe="paper", structures=(name, name), **INGD)
        params = {"map": (weights()[:, :-1], weights()[:, -1])}
        state = optimizer.init(params)
        for x, _, B, grad in rows(4):
            grads = {"map": (grad[:, :-1], grad[:, -1])}
            updates, state = optimizer.update(grads, state, params, {"map": (x, B)})
            params = optimizer.apply(params, updates)
        runs.append(params["map"][0])
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=CLOSE, atol=CLOSE)


def test_ikfac_is_singd_without_momentum_and_with_unit_traces() -> None:
    """With tr H_C = d_out, tr CᵀC = d_out and likewise for K the adaptive factors are 1."""
    x = np.random.default_rng(0).standard_normal((12, 7))
    A = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / 12)).T  # U = I
    y = np.random.default_rng(1).standard_normal((12, 5))
    B = y @ np.linalg.inv(np.linalg.cholesky(y.T @ y * 12)).T  # G = I
    found = []
    for given in ({"rule": "ikfac"}, {"alpha1": 0.0}):
        optimizer = Optimizer(recipe="paper", **PAPER | given)
        p = {"map": weights()}
        updates, _ = optimizer.update({"map": B.T @ A}, optimizer.init(p), p, {"map": (A, B)})
        found.append(updates["map"])
    np.testing.assert_allclose(*found, rtol=CLOSE)
