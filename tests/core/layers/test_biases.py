"""Which parameters are biases of which weights, and how a weight with a bias is a matrix."""

from typing import Any

import numpy as np
import pytest

from singd_core.layers import Tensor
from singd_core.layers.biases import biases

Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ("weight", "bias"),
        ("0.weight", "0.bias"),
        ("lstm.weight_hh_l0_reverse", "lstm.bias_hh_l0_reverse"),
        ("attention.in_proj_weight", "attention.in_proj_bias"),
        ("params.Dense_0.kernel", "params.Dense_0.bias"),
        ("linear.w", "linear.b"),
        ("block.W_out", "block.b_out"),
        ("W1", "b1"),
    ],
)
def test_names_tell_biases(weight: str, bias: str) -> None:
    shapes: dict[str, Shape] = {weight: (4, 4), bias: (4,)}
    assert [found[:2] for found in biases(shapes)] == [(weight, bias)]


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.weight": (4, 3), "b.bias": (4,)},  # of another module
        {"weight": (4, 3), "bias": (5,)},  # of another length
        {"weight": (4,), "bias": (4,)},  # of a norm
        {"weight": (4, 3)},
        {"weight": (4, 3), "bias": (4, 3)},
        {"weight": (4, 3), "bias": ()},
        {"new": (4, 3), "beb": (4,)},  # a letter of a word is no word
        {"weighted": (4, 3), "biased": (4,)},
        {"weight.bias": (4, 3), "bias.bias": (4,)},  # the last part tells
        {"weight": (1, 64), "bias": (1,)},  # to a single output
        {"kernel": (64, 1), "bias": (1,)},
        {"weight": (1, 1), "bias": (1,)},
        {"weight": (8, 3, 3, 3), "bias": (3,)},  # of a transposed convolution, to three channels
    ],
    ids=str,
)
def test_what_is_no_pair(shapes: dict[str, Shape]) -> None:
    assert list(biases(shapes)) == []


def test_a_bias_has_one_weight() -> None:
    shapes: dict[str, Shape] = {"weight": (4, 3), "kernel": (3, 4), "bias": (4,)}
    assert [found[:2] for found in biases(shapes)] == [("weight", "bias")]


@pytest.mark.parametrize(
    ("shape", "bias", "expected"),
    [
        ((4, 3), (4,), ((), 4, 3)),
        ((3, 4), (4,), ((), 4, 3)),  # the rows come last
        ((64, 32, 3, 3), (64,), ((), 64, 288)),  # a kernel of torch
        ((3, 3, 32, 64), (64,), ((), 64, 288)),  # and of flax
        ((3, 3, 1, 8), (8,), ((), 8, 9)),
        ((48, 4, 12), (4, 12), ((), 48, 48)),  # a projection to heads
        ((4, 12, 48), (48,), ((), 48, 48)),  # and from them
        ((8, 32, 64), (8, 64), ((8,), 64, 32)),  # experts, or the layers of a scan
        ((8, 64, 32), (8, 64), ((8,), 64, 32)),
        ((6, 16, 2, 8), (6, 2, 8), ((6,), 16, 16)),  # a scan of projections to heads
        ((5, 6, 7), (5,), ((), 5, 42)),  # of nn.Bilinear
        ((64, 1), (64,), ((), 64, 1)),  # of a single input
        ((8, 64, 1), (8, 1), ((8,), 1, 64)),
    ],
    ids=str,
)
def test_the_matrix_of_a_weight_with_a_bias(shape: Shape, bias: Shape, expected: Any) -> None:
    kind = Tensor.with_bias(shape, bias)
    assert kind is not None
    assert kind.shape(shape, bias=True) == kind.shape(shape, bias=False) == expected
    for first in ((), (2,)):  # alone, and of equal ones along a first axis
        x = np.random.default_rng(0).standard_normal((*first, *shape))
        M = kind.matrix(x, np.zeros((*first, *bias)))
        assert M.shape == (*first, *expected[0], *expected[1:])
        back, none = kind.split(M, shape, bias=True)
        assert np.array_equal(back, x)
        assert none is None


@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_a_name_tells_the_rows_of_a_square_weight(name: str) -> None:
    """Those of torch and Equinox come first, those of flax last."""
    ((_, _, kind),) = biases({name: (4, 4), "bias": (4,)})
    assert kind.is_turned is (name == "kernel")
    x = np.arange(16.0).reshape(4, 4)
    assert np.array_equal(kind.matrix(x), x.T if kind.is_turned else x)


@pytest.mark.parametrize(
    ("kind", "axis", "rows"),
    [
        (Tensor(0, 1, 1), 0, True),
        (Tensor(0, 1, 1), 1, False),
        (Tensor(0, 1, 1, transposed=True), 0, False),
        (Tensor(0, 1, 1, transposed=True), 1, True),
        (Tensor(0, 1, 3), 0, True),
        (Tensor(0, 1, 3), 1, False),
        (Tensor(0, 1, 3), 2, None),
        (Tensor(1, 1, 1), 0, True),
        (Tensor(1, 1, 1, transposed=True), 0, None),
    ],
    ids=str,
)
def test_the_axis_of_the_rows(kind: Tensor, axis: int, rows: bool | None) -> None:
    assert kind.has_rows_along(axis) is rows
