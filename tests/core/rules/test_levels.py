"""What is measured of the rows and columns of a natural gradient, section 5 of the page."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from backends import WIDE, Backend

from singd_core import rules, settings
from singd_core.levels import FLOOR, Levels, leveled
from singd_core.structures import Dense

D_OUT, D_IN = 5, 7


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def even(backend: Backend, dtype: str, batch: tuple[int, ...] = ()) -> Levels:
    return Levels.even(batch, D_OUT, D_IN, backend.to(np.zeros(1), dtype))


def relative(natural: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squares = natural**2
    mean = squares.mean((-2, -1))[..., None]
    return squares.mean(-1) / mean, squares.mean(-2) / mean


@pytest.mark.parametrize(("backend", "dtype"), WIDE, ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_the_scales_in_use_are_taken_out(backend: Backend, dtype: str, batch: Any) -> None:
    with backend.active():
        natural = drawn(0, *batch, D_OUT, D_IN) * np.geomspace(1e-2, 1e2, D_IN)
        levels = even(backend, dtype, batch)
        before = drawn(1, *batch, D_OUT, D_IN) * np.geomspace(1e-3, 1e3, D_OUT)[:, None]
        levels = levels.measured(backend.to(before, dtype), 1.0)
        columns, rows = map(backend.back, levels.scales())
        scaled = backend.to(rows[..., None] * natural * columns[..., None, :], dtype)
        found = levels.measured(scaled, 1.0)
        for got, wanted in zip((found.rows, found.columns), relative(natural), strict=True):
            np.testing.assert_allclose(backend.back(got), wanted, 1e-4, 1e-6)


def test_large_matrices_are_measured_in_parts() -> None:
    natural = drawn(2, 300, 301)
    found = Levels.even((), 300, 301, natural).measured(natural, 1.0)
    rows, columns = relative(natural)
    np.testing.assert_allclose(found.rows, rows, 1e-12)
    np.testing.assert_allclose(found.columns, columns, 1e-12)


@pytest.mark.parametrize("c", [0.0, 1e-12, 1e12])
def test_any_scale_is_the_same_and_zeros_count_for_nothing(c: float) -> None:
    natural, start = drawn(3, D_OUT, D_IN), Levels.even((), D_OUT, D_IN, np.zeros(1))
    found = start.measured(c * natural, 0.5)
    expected = start if c == 0.0 else start.measured(natural, 0.5)
    np.testing.assert_allclose(found.rows, expected.rows, 1e-12)
    np.testing.assert_allclose(found.columns, expected.columns, 1e-12)


def test_a_row_without_gradient_is_not_enlarged_beyond_the_floor() -> None:
    natural = drawn(4, D_OUT, D_IN)
    natural[2] = 0.0
    found = Levels.even((), D_OUT, D_IN, natural).measured(natural, 1.0)
    assert found.scales()[1][2] == pytest.approx(FLOOR**-0.5)
    assert np.isclose(found.rows.mean(), 1.0)


def test_the_first_measurement_after_a_refresh_counts_in_full_and_none_before() -> None:
    s, natural = settings(), drawn(5, D_OUT, D_IN)
    zero = np.zeros(1)
    factors = rules.start((Dense, Dense), ((), D_OUT, D_IN), s, zero, zero)
    assert np.array_equal(leveled(factors, natural, 0.1).levels.rows, np.ones(D_OUT))
    averages = dataclasses.replace(factors.averages, k=np.ones(()))
    factors = dataclasses.replace(factors, averages=averages)
    rows = leveled(factors, natural, 0.1).levels.rows
    np.testing.assert_allclose(rows, relative(natural)[0], 1e-12)
