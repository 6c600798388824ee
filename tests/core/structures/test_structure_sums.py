"""Sums of rows without L tell what rows seen by L would have."""

from typing import Any

import numpy as np
import pytest
from backends import WIDE, Backend
from hypothesis import given
from test_structure_parameters import SEEDS, SIDES, STRUCTURES

from singd_core.curvature import measure, seen
from singd_core.structures import Structure, get

NAMES = [
    *("dense", "diagonal", "blockdiagonal:3", "hierarchical:2,3", "tril", "triu"),
    *("triltoeplitz", "triutoeplitz", "trilbottomrightdiag:2", "triutopleftdiag:2"),
]


def both(L: Structure, rows: Any) -> tuple[Any, Any]:
    """Π̂(LᵀXᵀXL) from sums without L, and measured with it."""
    d = rows.shape[-1]
    blind = type(L).sums().identity(d, like=L.like)
    found = seen(L, measure(blind, rows, identity=True))
    wanted = measure(L, rows)
    return found.S.dense(), wanted.S.dense()


@given(STRUCTURES, SIDES, SEEDS)
def test_sums_without_a_factor_are_seen_by_it(S: type[Structure], d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    L = S.restrict(rng.standard_normal((d, d)))
    found, wanted = both(L, rng.standard_normal((9, d)))
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            b, dtype, marks=pytest.mark.slow if (b.name, dtype) == ("jax", "float64") else []
        )
        for b, dtype in WIDE
    ],
    ids=str,
)
def test_sums_of_a_stack_are_seen_on_all_arrays(backend: Backend, dtype: str, name: str) -> None:
    rng = np.random.default_rng(0)
    with backend.active():
        L = get(name).restrict(backend.to(rng.standard_normal((2, 7, 7)), dtype))
        found, wanted = both(L, backend.to(rng.standard_normal((2, 9, 7)), dtype))
        # the rounding of sums of 9 × 7 × 7 terms
        tolerance = 2000 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(
            backend.back(found), backend.back(wanted), rtol=0, atol=tolerance
        )


def test_few_structures_keep_less_than_all() -> None:
    own = [name for name in NAMES if get(name).sums() is get(name)]
    assert own == ["dense", "diagonal", "blockdiagonal:3"]
    assert all(get(name).sums() is get("dense") for name in NAMES if name not in own)
