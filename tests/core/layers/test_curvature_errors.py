"""What does not fit is refused by name, with the way out."""

from typing import Any

import numpy as np
import pytest

from singd_core.layers import (
    Convolution,
    Embedding,
    LayerKind,
    Linear,
    StackedLinear,
    TransposedConvolution,
)
from singd_core.layers.base import loss_terms

KINDS = [(Linear(), np.ones((2, 5, 3))), (Convolution((3,)), np.ones((2, 3, 5)))]


@pytest.mark.parametrize(("kind", "x"), KINDS)
def test_an_unknown_kfac_approx_lists_the_choices(kind: LayerKind, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"kfac_approx = 'exact': choose 'expand' or 'reduce'"):
        kind.inputs(x, bias=False, kfac_approx="exact")
    with pytest.raises(ValueError, match=r"kfac_approx = 'exact': choose 'expand' or 'reduce'"):
        kind.outputs(x, kfac_approx="exact", loss_average=None)


@pytest.mark.parametrize(("kind", "x"), KINDS)
def test_an_unknown_loss_average_lists_the_choices(kind: LayerKind, x: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"'mean': choose 'batch', 'batch\+sequence', the number of terms"
    ):
        kind.outputs(x, kfac_approx="expand", loss_average="mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3}, r"kernel_size = 3: give a tuple"),
        ({"kernel_size": ()}, r"kernel_size = \(\): give a tuple"),
        ({"kernel_size": (3, 0)}, r"kernel_size = \(3, 0\): every entry must be at least 1"),
        ({"stride": (1, 1, 1)}, r"stride = \(1, 1, 1\): give one number, or 2"),
        ({"stride": 0}, r"stride = 0: every entry must be at least 1"),
        ({"dilation": (1, -1)}, r"dilation = \(1, -1\): every entry must be at least 1"),
        ({"padding": -1}, r"padding entry -1: must be at least 0"),
        ({"padding": 1.0}, r"padding entry 1\.0: must be at least 0 and whole"),
        ({"kernel_size": (3.0, 3)}, r"kernel_size = \(3\.0, 3\): every entry .* and whole"),
        ({"stride": 1.5}, r"stride = 1\.5: every entry must be at least 1 and whole"),
        ({"dilation": (1, 2.0)}, r"dilation = \(1, 2\.0\): every entry .* and whole"),
        ({"groups": 2.0}, r"groups = 2\.0: must be at least 1 and whole"),
        ({"padding": ((0, 1, 2), 0)}, r"padding entry \(0, 1, 2\): .* a pair"),
        ({"padding": "full"}, r"padding = 'full': choose 'same', 'valid', or numbers"),
        ({"padding": "same", "stride": 2}, r"padding = 'same' needs stride = 1"),
        ({"padding_mode": "wrap"}, r"padding_mode = 'wrap': choose one of 'zeros', 'reflect'"),
        ({"groups": 0}, r"groups = 0: must be at least 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Convolution(**({"kernel_size": (3, 3)} | arguments))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (StackedLinear, 0, "parts = 0: must be at least 1 and whole"),
        (StackedLinear, 2.0, r"parts = 2\.0: must be at least 1 and whole"),
        (Embedding, 5.0, r"entries = 5\.0: must be at least 0 and whole"),
    ],
)
def test_a_number_that_is_none_is_named(kind: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(given)


def test_a_transposed_convolution_has_no_named_padding() -> None:
    with pytest.raises(ValueError, match="padding = 'same': give numbers"):
        TransposedConvolution((3,), padding="same")  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    one, two, three = map(np.int64, (1, 2, 3))
    for kind in (Convolution, TransposedConvolution):
        own = kind((three,), stride=two, padding=one, dilation=two, groups=two)
        assert own == kind((3,), stride=2, padding=1, dilation=2, groups=2)
    assert StackedLinear(three) == StackedLinear(3)
    assert Embedding(three) == Embedding(3)
    assert loss_terms(three, 8, (5,)) == 3


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (5, 5), r"input x has shape \(5, 5\): .* 4 axes, or 3 without the batch"),
        ({}, (2, 2, 3, 5, 5), r"input x has shape \(2, 2, 3, 5, 5\)"),
        ({"groups": 2}, (2, 3, 5, 5), r"3 input channels are not divisible by groups = 2"),
        ({"dilation": 3}, (2, 3, 6, 6), r"reaches over 7 entries does not fit .* axis of 6"),
        ({"padding": 5, "padding_mode": "reflect"}, (2, 3, 5, 9), r"at most 4 .* axis of 5"),
        ({"padding": 6, "padding_mode": "circular"}, (2, 3, 5, 9), r"at most 5 .* axis of 5"),
        ({"padding": 1, "padding_mode": "replicate"}, (2, 3, 0, 9), r"at most 0 .* axis of 0"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    arguments: dict[str, Any], shape: tuple[int, ...], message: str, kfac_approx: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Convolution((3, 3), **arguments).inputs(np.ones(shape), bias=True, kfac_approx=kfac_approx)


def test_an_output_gradient_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output gradient g has shape \(4, 4\)"):
        Convolution((3, 3)).outputs(np.ones((4, 4)), kfac_approx="expand", loss_average=None)
    with pytest.raises(ValueError, match=r"3 output channels are not divisible by groups = 2"):
        Convolution((3,), groups=2).outputs(
            np.ones((2, 3, 4)), kfac_approx="reduce", loss_average=None
        )


def test_a_number_is_no_input_of_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"input x of a linear layer is a number"):
        Linear().inputs(np.asarray(1.0), bias=True, kfac_approx="expand")
