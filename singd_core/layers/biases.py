"""Which parameters are the biases of which weights, as their names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from singd_core.layers.tensor import Tensor

# What a weight is called, what its bias is, and whether its columns come first where its shape
# does not tell. The word may stand among others: "weight_hh_l0", "in_proj_weight", "w_out".
_WORDS = (("weight", "bias", False), ("kernel", "bias", True), ("w", "b", True), ("W", "b", True))


def biases(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, Tensor]]:
    """The weights that have a bias, with its name, and how the weight is a matrix.

    Names are paths with dots. The last part tells, and the rest is the same for both. A bias is of
    the first weight that it may be of.
    """
    taken = set[str]()
    for name, shape in shapes.items():
        bias, transposed = _bias_of(name)
        if bias not in shapes or bias in taken:
            continue
        kind = Tensor.with_bias(shape, shapes[bias], transposed=transposed)
        # the last axes of a convolution's "weight" are those of its kernel
        of_kernel = kind is not None and kind.transposed > transposed and kind.outs + kind.ins > 2
        if kind is not None and not of_kernel:
            taken.add(bias)
            yield name, bias, kind


def _bias_of(name: str) -> tuple[str, bool]:
    """What the bias of a weight is called, and whether its columns come first; "" for none."""
    path, dot, last = name.rpartition(".")
    for word, bias, transposed in _WORDS:
        found, count = re.subn(rf"(?<![A-Za-z]){word}(?![A-Za-z])", bias, last, count=1)
        if count:
            return path + dot + found, transposed
    return "", False
