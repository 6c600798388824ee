"""Weight and bias become a matrix, and come back."""

import numpy as np
import pytest
from curvature_cases import CASES

from singd_core.layers import Convolution, LayerKind, Linear

KINDS: dict[str, tuple[LayerKind, tuple[int, ...], tuple[tuple[int, ...], int, int]]] = {
    "linear": (Linear(), (4, 3), ((), 4, 3)),
    "1d": (Convolution((5,)), (4, 3, 5), ((), 4, 15)),
    "2d": (Convolution((5, 2)), (4, 3, 5, 2), ((), 4, 30)),
    "groups": (Convolution((2, 2), groups=2), (6, 3, 2, 2), ((2,), 3, 12)),
    "depthwise": (Convolution((2, 2), groups=6), (6, 1, 2, 2), ((6,), 1, 4)),
    "averaged groups": (
        Convolution((2, 2), groups=2, average_groups=True),
        (6, 3, 2, 2),
        ((), 6, 12),
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_split_undoes_matrix(backend, name: str, bias: bool, rng: np.random.Generator) -> None:
    kind, weight_shape, (groups, d_out, d_in) = KINDS[name]
    assert kind.shape(weight_shape, bias) == (groups, d_out, d_in + bias)
    weight = backend.array(rng.normal(size=weight_shape))
    b = backend.array(rng.normal(size=weight_shape[:1])) if bias else None
    matrix = kind.matrix(weight, b)
    assert matrix.shape == (*groups, d_out, d_in + bias)
    weight_back, b_back = kind.split(matrix, weight_shape, bias)
    np.testing.assert_array_equal(backend.numpy(weight_back), backend.numpy(weight))
    if bias:
        np.testing.assert_array_equal(backend.numpy(b_back), backend.numpy(b))
    else:
        assert b_back is None


@pytest.mark.parametrize("name", KINDS)
def test_split_gives_views(name: str) -> None:
    torch = pytest.importorskip("torch")
    kind, weight_shape, _ = KINDS[name]
    matrix = kind.matrix(torch.ones(weight_shape), torch.ones(weight_shape[0]))
    weight, bias = kind.split(matrix, weight_shape, True)
    storage = matrix.untyped_storage().data_ptr()
    assert weight.untyped_storage().data_ptr() == storage
    assert bias.untyped_storage().data_ptr() == storage


def test_layers_of_equal_kind_are_equal_however_they_are_written() -> None:
    pairs = Convolution((3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    for same in (Convolution((3, 3), padding=1), Convolution((3, 3), padding="same")):
        assert same == pairs
        assert hash(same) == hash(pairs)
    assert Convolution((3, 3), padding=1) != Convolution((3, 3), padding=2)
    assert len({case.kind() for case in CASES.values()}) > 20
