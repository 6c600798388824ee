"""Which structures layers get by cost, where rows are few or entries are rare."""

from typing import Any

import pytest

from singd_core import rules
from singd_core.structures import Dense, Diagonal, blockdiagonal
from singd_core.structures.choose import resolve

TABLE: dict[str, Any] = {"diagonal": (True, False)}


@pytest.mark.parametrize(
    ("d_out", "d_in", "K", "C"),
    [
        (200, 2, Dense, blockdiagonal(25)),  # 25 divides 200, and is at most 16 × 2
        (2, 200, blockdiagonal(25), Dense),
        (40, 1, Dense, blockdiagonal(10)),
        (64, 32, Dense, Dense),
        (128, 128, Dense, Dense),
    ],
)
def test_factors_that_learn_from_gradients_are_no_wider_than_what_they_remember(
    d_out: int, d_in: int, K: type, C: type
) -> None:
    assert resolve(None, ((), d_out, d_in), by_rows=False) == (K, C)
    assert resolve(None, ((), d_out, d_in)) == (Dense, Dense)
    assert resolve("cost:512", ((), d_out, d_in), by_rows=False) == (K, C)
    assert resolve("dense", ((), d_out, d_in), by_rows=False) == (Dense, Dense)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    ("d_out", "d_in", "K", "C"),
    [
        (12_641, 64, Dense, Diagonal),
        (50_257, 768, blockdiagonal(128), Diagonal),  # 128 divides 768, and is at most 152
        (784, 64, Dense, Diagonal),
        (700, 64, Dense, blockdiagonal(70)),  # eight blocks
        (4096, 1024, blockdiagonal(64), blockdiagonal(64)),  # four times as many
        (64, 7056, blockdiagonal(63), Dense),  # inputs, such as pixels, correlate
    ],
)
def test_a_layer_to_many_outputs_has_a_diagonal_C(
    d_out: int, d_in: int, K: type, C: type, by_rows: bool
) -> None:
    assert resolve(None, ((), d_out, d_in), by_rows=by_rows) == (K, C)


@pytest.mark.parametrize("entries", [511, 512, 50_000])
def test_a_large_table_of_bags_has_diagonal_factors(entries: int) -> None:
    shape, bags = ((), 16, entries), {"entries_of_bags": entries}
    wanted = Dense if entries < 512 else Diagonal
    assert resolve(None, shape, **TABLE, **bags) == (Diagonal, wanted)
    assert resolve("cost:64", shape, **TABLE, **bags) == (Diagonal, wanted)
    assert resolve(None, shape, **TABLE)[1] is Dense
    assert resolve(("dense", "dense"), shape, **TABLE, **bags)[1] is Dense
    assert resolve("auto:64", shape, **TABLE, **bags)[1] is Dense
    turned = resolve(None, ((), entries, 16), by_rows=False, diagonal=(False, True), **bags)
    assert turned == (wanted, Diagonal)
    assert resolve(None, ((), 600, 10), entries_of_bags=10, **TABLE)[1] is not Diagonal


def test_a_rule_whose_factors_are_dense_has_them_all_the_same() -> None:
    KFAC = rules.get("kfac")
    assert KFAC.choose(None, ((), 200, 2), by_rows=False) == (Dense, Dense)
    assert KFAC.choose(None, ((), 16, 1000), entries_of_bags=1000) == (Dense, Dense)
