"""Settings: two recipes, what is given wins, and what cannot be is named."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from singd_core import RECIPES, Settings, settings
from singd_core._settings import gap, is_due, rate, rate_of_factors


def test_there_are_two_recipes_and_normalized_is_the_default() -> None:
    assert set(RECIPES) == {"paper", "normalized"}
    assert settings() == settings("normalized") == RECIPES["normalized"]


def test_paper_is_what_the_authors_package_does_by_default() -> None:
    """Compared with the signature of singd 0.0.5 itself."""
    import inspect

    optimizer = pytest.importorskip("singd.optim.optimizer").SINGD
    theirs = {n: p.default for n, p in inspect.signature(optimizer).parameters.items()}
    ours = dataclasses.asdict(settings("paper"))
    common = theirs.keys() & ours.keys()
    assert common == {
        "lr", "momentum", "damping", "alpha1", "weight_decay", "T", "lr_cov", "normalize_lr_cov",
    }  # fmt: skip
    assert {n: ours[n] for n in common} == {n: theirs[n] for n in common}
    assert settings("paper", kfac_like=theirs["kfac_like"]) == settings("paper")
    bounds, others = {"factor_bound", "rows"}, {"order", "rule", "rounding"}
    assert all(ours[name] == math.inf for name in bounds)
    assert (ours["order"], ours["rule"]) == (1, "singd")
    assert ours["rounding"] == "stochastic"  # which changes nothing in float32
    assert not any(ours[name] for name in ours.keys() - common - bounds - others)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_authors_name_of_a_rule_is_an_alias(recipe: str) -> None:
    own = settings(recipe).rule
    expected = {
        "singd": [{"kfac_like": False}, {"kfac_like": False, "kfac": False}],
        "ikfac": [{"kfac_like": True}, {"kfac_like": True, "rule": "ikfac"}],
        "kfac": [{"kfac": True}, {"kfac": True, "kfac_like": True}],
        own: [{"kfac": False}, {"kfac_like": None}],
    }
    for rule, several in expected.items():
        for given in several:
            assert settings(recipe, **given) == settings(recipe, rule=rule)
    with pytest.raises(ValueError, match=r"rule='singd' and kfac_like=True: give the rule alone"):
        settings(recipe, rule="singd", kfac_like=True)
    with pytest.raises(ValueError, match="kfac_like=1: must be True or False"):
        settings(recipe, kfac_like=1)
    with pytest.raises(ValueError, match="rule='adam': there are 'singd', 'ikfac', 'kfac'"):
        settings(recipe, rule="adam")


def test_a_scalar_of_numpy_is_the_number_it_holds() -> None:
    """Else it would make float64 of arrays in float32, or meet arrays of another library."""
    for kind in (np.float64, np.float32, np.float16):
        chosen = settings(lr=kind(0.5), lr_cov=lambda step, kind=kind: kind(0.25), T=np.int64(3))
        assert type(chosen.lr) is float
        assert type(rate(chosen.lr_cov, 0)) is float
        assert type(chosen.T) is int


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_setting_can_be_given_and_wins(field: Any, recipe: str) -> None:
    other = {
        "lr": 0.5, "momentum": 0.5, "weight_decay": 0.5, "T": 7, "lr_cov": 0.5, "damping": 0.7,
        "alpha1": 0.25, "factor_bound": 0.1, "order": 3, "warmup": 5,
        "rows": 77, "rule": "kfac", "rounding": "nearest", "seed": 3,
    }  # fmt: skip
    recipes_value = getattr(RECIPES[recipe], field.name)
    value = other.get(field.name, not recipes_value)
    chosen = settings(recipe, **{field.name: value})
    assert chosen == dataclasses.replace(RECIPES[recipe], **{field.name: value})
    assert getattr(chosen, field.name) != recipes_value
    assert settings(recipe, **{field.name: None}) == RECIPES[recipe]


def test_settings_cannot_be_changed_behind_the_optimizers_back() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lr", [-0.1, math.nan, math.inf], "must be at least 0 and finite"),
        ("weight_decay", [-1e-9, math.nan], "must be at least 0 and finite"),
        ("lr_cov", [-0.1, 1.5, math.inf], r"must be in \[0, 1\], or a function"),
        ("rows", [0, 1.5, math.nan], "must be at least 1 and whole"),
        ("damping", [-0.1, math.nan], "must be at least 0 and finite"),
        ("momentum", [-0.1, 1.0, 2, math.nan], r"must be in \[0, 1\)"),
        ("alpha1", [-0.1, 1.0, math.nan], r"must be in \[0, 1\)"),
        ("factor_bound", [0.0, -1.0, math.nan], "must be positive"),
        ("T", [0, -1, 1.0, 2.5, "10"], "must be an integer of at least 1"),
        ("order", [0, 1.5], "must be an integer of at least 1"),
        ("warmup", [-1, 2.5], "must be an integer of at least 0"),
        ("seed", [-1, 2.5, True], "must be an integer of at least 0"),
        ("rounding", ["up", True], "there are .stochastic., .nearest., .kahan."),
    ],
)
def test_a_value_out_of_range_is_named(name: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name}={value!r}: {message}".replace("'", ".")):
            settings(**{name: value})


@pytest.mark.parametrize("name", ["lr", "weight_decay", "lr_cov", "damping", "momentum", "alpha1"])
def test_zero_is_a_rate(name: str) -> None:
    assert getattr(settings(**{name: 0.0}), name) == 0.0


def test_an_array_is_not_looked_into() -> None:
    """Its value may be on a device that would have to be waited for."""
    value = np.asarray(-1.0)
    assert settings(lr=value).lr is value


def test_unknown_names_are_errors_that_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"recipe='fast': there are 'paper', 'normalized'"):
        settings("fast")
    with pytest.raises(
        ValueError, match=r"'learning_rate' \(was 'lr' meant\?\); there are lr, momentum, nes"
    ):
        settings(learning_rate=0.1)


def test_a_schedule_is_called_with_the_number_of_steps_taken() -> None:
    assert rate(lambda step: 0.5**step, 3) == 0.125
    assert rate(0.25, 3) == 0.25
    schedule = settings(lr_cov=lambda step: 0.1).lr_cov
    assert callable(schedule)


@pytest.mark.parametrize(
    ("recipe", "value", "allowed"),
    [
        ("normalized", 1.5, r"in \[0, 1\]"),
        ("paper", -0.1, "at least 0"),
        ("paper", None, "at least"),
    ],
)
def test_a_schedule_that_returns_no_rate_is_named(recipe: str, value: Any, allowed: str) -> None:
    s = settings(recipe, lr_cov=lambda step: value)
    with pytest.raises(ValueError, match=rf"lr_cov\(3\) is {value}: must be a number.* {allowed}"):
        rate_of_factors(3, s)


def test_gaps_grow_with_the_steps_taken_and_up_to_T() -> None:
    s = settings("normalized")
    due = [t for t in range(1000) if is_due(t, s)]
    assert due[:20] == list(range(20))
    for t, following in itertools.pairwise(due):
        assert 1 <= following - t <= max(1, 2.0 * min(following / 10, 50))
    windows = [t // 50 for t in due if t >= 650]
    assert windows == list(range(13, 20))
    assert gap(10**6, settings("normalized", T=7)) == 7
    assert [gap(t, settings("normalized", growing_T=False, T=7)) for t in (0, 99)] == [7, 7]


@pytest.mark.parametrize("T", [50, 32, 7])
@pytest.mark.parametrize("turn", [1, 3, 25, 50])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 10])
def test_refreshes_keep_no_time_with_what_comes_in_turns(count: int, turn: int, T: int) -> None:
    """Networks in turns, or data in turns: each has its share of the refreshes."""
    s = settings("normalized", T=T)
    due = [t // turn % count for t in range(640, 20_000) if is_due(t, s)]
    counts = [due.count(phase) for phase in range(count)]
    assert min(counts) > 0.7 * len(due) / count, counts


@pytest.mark.parametrize("batches", [32, 50, 64, 100, 469])
def test_refreshes_see_all_parts_of_an_epoch_that_has_one_order(batches: int) -> None:
    s = settings("normalized")
    due = [t % batches * 8 // batches for t in range(640, 40_000) if is_due(t, s)]
    counts = [due.count(part) for part in range(8)]
    assert min(counts) > 0.7 * len(due) / 8, counts


def test_gaps_of_arrays_are_those_of_numbers() -> None:
    s, steps = settings("normalized"), np.arange(1000)
    np.testing.assert_array_equal(gap(steps, s), [gap(t, s) for t in range(1000)])
    np.testing.assert_array_equal(
        [gap(np.asarray(t), s, np.asarray(7)) for t in range(300)],
        [gap(t, settings("normalized", T=7)) for t in range(300)],
    )
    for first in (0, 2**31 - 1 - 1000):  # products of 32 bits overflow
        late = np.arange(first, first + 1000, dtype=np.int32)
        expected = [is_due(int(t), s) for t in late]
        np.testing.assert_array_equal(is_due(late, s, np.int32(s.T)), expected)


def test_the_rate_of_the_factors_is_that_of_the_steps_of_a_gap() -> None:
    s = settings("normalized", lr_cov=0.1)
    assert rate_of_factors(0, s) == pytest.approx(0.1)
    assert rate_of_factors(100, s) == pytest.approx(1.0 - 0.9**8)
    assert rate_of_factors(100, settings("paper", lr_cov=0.1)) == 0.1
