"""What kinds of layers answer the frontends, so that no frontend has a list of kinds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from singd_core import Convolution, Embedding, Linear, StackedLinear, TransposedConvolution
from singd_core.layers import Tensor

FRONTENDS = Path(__file__).parents[3] / "frontends"
TURNED = Linear(transposed=True)
TABLE = Embedding(7, padding_idx=0)
SMALL = Convolution((3, 3), groups=2)
STRIDED = Convolution((3, 3), stride=2, groups=2)

CALLS: list[tuple[Any, Any, Any]] = [  # a layer, a call that is handed its weight, what it is
    (Linear(), Linear(), Linear()),
    (Linear(), TURNED, TURNED),
    (Linear(), TABLE, TABLE),
    (TABLE, Linear(), Linear()),
    (TABLE, TABLE, TABLE),
    (SMALL, STRIDED, STRIDED),
    (SMALL.with_average_groups(), STRIDED, STRIDED.with_average_groups()),
    (SMALL, Convolution((3, 3)), None),
    (SMALL, Convolution((3,), groups=2), None),
    (TransposedConvolution((2,)), TransposedConvolution((2,)), TransposedConvolution((2,))),
    (TransposedConvolution((2,)), TransposedConvolution((2,), stride=2), None),
    (Linear(), SMALL, None),
    (SMALL, Linear(), None),
    (StackedLinear(3), Linear(), None),
]


@pytest.mark.parametrize(("own", "call", "expected"), CALLS, ids=str)
def test_which_calls_give_rows(own: Any, call: Any, expected: Any) -> None:
    assert own.of_call(call) == expected


def test_a_look_up_and_a_linear_map_by_its_table_change_sides() -> None:
    assert [kind.is_turned for kind in (Linear(), TURNED, TABLE)] == [False, True, True]
    assert Linear().of_transpose() == TURNED
    assert TURNED.of_transpose() == Linear()
    assert TABLE.of_transpose() is None


def test_positions_are_what_a_mask_may_leave_out() -> None:
    x = np.zeros((2, 5, 3))
    assert Linear().positions(x) == StackedLinear(3).positions(x) == (2, 5)
    assert TABLE.positions(np.zeros((2, 5), dtype=int)) == (2, 5)
    assert SMALL.positions(np.zeros((2, 4, 5, 5))) is None
    assert (Linear().no_row, TABLE.no_row) == (None, 7)


def test_whole_rows_can_be_told_from_columns() -> None:
    assert [Linear().has_rows_along(axis) for axis in (0, 1)] == [True, False]
    assert [TURNED.has_rows_along(axis) for axis in (0, 1)] == [False, True]
    assert [TABLE.has_rows_along(axis) for axis in (0, 1)] == [False, True]
    for kind in (Convolution((3, 3)), SMALL, Tensor.of((64, 2, 3, 3))):
        assert [kind.has_rows_along(axis) for axis in range(4)] == [True, False, None, None]
    turned = TransposedConvolution((3, 3))
    assert [turned.has_rows_along(axis) for axis in range(4)] == [False, True, None, None]
    assert TransposedConvolution((3, 3), groups=2).has_rows_along(0) is None
    assert [StackedLinear(3).has_rows_along(axis) for axis in (0, 1)] == [True, False]
    assert [Tensor.of((3, 8, 9)).has_rows_along(axis) for axis in range(3)] == [True, None, None]
    assert StackedLinear(3, apart=True).has_rows_along(0) is None


def test_patches_are_larger_than_the_image() -> None:
    x, g = np.zeros((2, 4, 5, 5)), np.zeros((2, 6, 3, 3))
    assert SMALL.unfolded(x, g) == 9
    assert SMALL.unfolded(x[0], g[0]) == 0
    assert Linear().unfolded(x, g) is None


def test_one_hot_rows_in_full_square_to_the_row_of_roots() -> None:
    x = np.array([[1, 0, 6], [1, 2, 0]])
    full = TABLE.all_inputs(x, bias=False, like=np.zeros(0))
    roots, N = TABLE.inputs(x, bias=False, kfac_approx="expand")
    assert full.shape == (N, 7)
    np.testing.assert_allclose(np.diag(full.T @ full), roots[0] ** 2, rtol=1e-6)


def test_no_frontend_asks_for_the_class_of_a_kind() -> None:
    """Outside of the tables of modules and functions, where kinds are made."""
    kinds = "Linear|Convolution|Embedding|StackedLinear|TransposedConvolution|TensorKind"
    asked = re.compile(rf"(isinstance\([^)]*[ (](?<!nn\.)({kinds})\b)|type\([a-z_.]*kind\)")
    lines = [
        f"{path.name}: {line.strip()}"
        for path in FRONTENDS.rglob("*.py")
        for line in path.read_text().splitlines()
        if asked.search(line)
    ]
    assert lines == []
