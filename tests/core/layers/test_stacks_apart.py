"""Stacks of matrices whose weight has an axis of its own for them."""

import numpy as np
import pytest
from backends import BACKENDS, Backend

from singd_core import StackedLinear


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_matrix_and_split_are_inverse(backend: Backend, transposed: bool) -> None:
    kind, weight = StackedLinear(3, apart=True, transposed=transposed), np.arange(24.0)
    weight = weight.reshape(3, 4, 2)
    assert kind.shape((3, 4, 2), bias=False) == ((3,), *((2, 4) if transposed else (4, 2)))
    with backend.active():
        matrix = kind.matrix(backend.to(weight, "float32"))
        back, bias = kind.split(matrix, (3, 4, 2), bias=False)
        found, back = backend.back(matrix), backend.back(back)
    assert bias is None
    np.testing.assert_array_equal(back, weight)
    np.testing.assert_array_equal(found, weight.transpose(0, 2, 1) if transposed else weight)


def test_the_axes_of_one_matrix_are_two() -> None:
    with pytest.raises(ValueError, match="weight of 2 axes"):
        StackedLinear(3, apart=True).shape((3, 4), bias=False)
