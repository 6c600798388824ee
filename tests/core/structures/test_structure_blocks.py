"""What is asked of structures whose rows can be multiplied apart."""

import numpy as np
import pytest

from singd_core.structures import Dense, Structure, get

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "d", "j"),
    [
        ("diagonal", 7, slice(2, 5)),
        ("blockdiagonal:3", 9, slice(3, 9)),
        ("blockdiagonal:3", 8, slice(0, 6)),
        ("blockdiagonal:3", 8, slice(3, 8)),
        ("blockdiagonal:3", 8, slice(6, 8)),
    ],
)
def test_a_part_is_a_block_of_the_matrix(name: str, d: int, j: slice) -> None:
    L = get(name).restrict(rng.standard_normal((d, d)))
    assert j.start % (L.blocks_of or 0) == 0
    np.testing.assert_array_equal(L.part(j).dense(), L.dense()[j, j])
    outside = L.dense()[j].copy()
    outside[:, j] = 0.0
    assert not outside.any()


@pytest.mark.parametrize("name", ["diagonal", "blockdiagonal:2"])
def test_a_stack_has_no_parts(name: str) -> None:
    assert get(name).restrict(rng.standard_normal((3, 4, 4))).blocks_of is None


def test_other_structures_have_no_parts() -> None:
    L = Dense(rng.standard_normal((4, 4)))
    assert L.blocks_of is None
    with pytest.raises(NotImplementedError, match="blocks"):
        L.part(slice(2))


@pytest.mark.parametrize(
    "name", ["diagonal", "dense", "tril", "blockdiagonal:3", "hierarchical:1,2"]
)
@pytest.mark.parametrize("c", [2.5, np.array([1.0, -2.0, 0.0])], ids=["number", "each"])
def test_shifted_is_the_sum_with_the_identity(name: str, c: float) -> None:
    L: Structure = get(name).restrict(rng.standard_normal((3, 5, 5)))
    expected = L.dense() + np.asarray(c)[..., None, None] * np.eye(5)
    np.testing.assert_allclose(L.shifted(c).dense(), expected, rtol=1e-15, atol=1e-15)
