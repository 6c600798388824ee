"""What calls of torch's functions are, whose weight is a parameter itself: layers, and which."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from singd_core.layers import (
    Convolution,
    Embedding,
    LayerKind,
    Linear,
    TransposedConvolution,
)

# The names of arguments, in order.
_NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.embedding: ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    F.embedding: (
        *("input", "weight", "padding_idx", "max_norm"),
        *("norm_type", "scale_grad_by_freq", "sparse"),
    ),
    torch.addmm: ("bias", "input", "weight"),
}
_CONVOLUTIONS = torch.conv1d, torch.conv2d, torch.conv3d
_OF_CONVOLUTIONS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES |= dict.fromkeys(_CONVOLUTIONS, _OF_CONVOLUTIONS)
_TRANSPOSED = torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d
_OF_TRANSPOSED = (
    *("input", "weight", "bias", "stride"),
    *("padding", "output_padding", "groups", "dilation"),
)
_NAMES |= dict.fromkeys(_TRANSPOSED, _OF_TRANSPOSED)
_PRODUCTS = torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm
_NAMES |= dict.fromkeys(_PRODUCTS, ("input", "weight"))
_TRANSPOSES = torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A call of a function, seen as the call of a layer.

    Attributes:
        x: The input.
        handed: The weight, or its transpose.
        weight: The weight.
        bias: The bias or None.
        kind: The kind of layer.
    """

    x: Tensor
    handed: Tensor
    weight: Tensor
    bias: Tensor | None
    kind: LayerKind


def is_transpose(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a call returns the transpose of a matrix."""
    return function in _TRANSPOSES and len(args) == 1 and args[0].ndim == 2


def reading(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    original: Callable[[Tensor], Tensor],
) -> Reading | None:
    """What layer a call is, or None if it is none that is known.

    Args:
        function: What is called.
        args: By position.
        kwargs: By name.
        original: The weight that a tensor is the transpose of, or the tensor itself.
    """
    names = _NAMES.get(function)
    if names is None or len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    x, handed, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(x, Tensor) or not isinstance(handed, Tensor):
        return None
    kind, weight = _kind(function, handed, given), original(handed)
    if weight is not handed:
        kind = Linear(not kind.transposed) if isinstance(kind, Linear) else None
    return None if kind is None else Reading(x, handed, weight, bias, kind)


def _kind(
    function: Callable[..., Any], weight: Tensor, given: Mapping[str, Any]
) -> LayerKind | None:
    if function in _CONVOLUTIONS or function in _TRANSPOSED:
        stride, padding = _entries(given.get("stride", 1)), _entries(given.get("padding", 0))
        groups, dilation = given.get("groups", 1), _entries(given.get("dilation", 1))
        if function in _CONVOLUTIONS:
            return _convolution(tuple(weight.shape[2:]), stride, padding, dilation, groups)
        more = _entries(given.get("output_padding", 0))
        return transposed(tuple(weight.shape[2:]), stride, padding, more, groups, dilation)
    if function in (F.embedding, torch.embedding):
        others = ("max_norm", "scale_grad_by_freq", "sparse")
        index = given.get("padding_idx")
        if any(given.get(name) for name in others):
            return None
        if function is torch.embedding and index == -1:  # its way to say None
            index = None
        return Embedding(len(weight), index if index is None or index >= 0 else len(weight) + index)
    if weight.ndim != 2 or given.keys() - {"input", "weight", "bias"}:
        return None
    if function is F.linear:
        return Linear()
    # Of a vector as a summand all rows have the same.
    fits = "bias" not in given or given["bias"].ndim == 1
    return Linear(transposed=True) if fits else None


def _entries(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else tuple(value)


@functools.lru_cache(maxsize=1024)
def _convolution(size: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Convolution:
    return Convolution(size, stride, padding, dilation, groups)


@functools.lru_cache(maxsize=1024)
def transposed(
    size: Any, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> TransposedConvolution | None:
    """The kind of a transposed convolution, None with groups or where windows fit more often."""
    kind = TransposedConvolution(size, stride, padding, dilation)
    more = (output_padding,) * len(size) if isinstance(output_padding, int) else output_padding
    windows = kind.convolution.windows
    fits = all(n < window.stride for n, window in zip(more, windows, strict=True))
    return kind if fits and groups == 1 else None
