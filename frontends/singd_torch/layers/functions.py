"""What calls of torch's functions are, whose weight is a parameter itself: layers, and which."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from singd_torch.layers.bags import Bags
from singd_torch.layers.products import PRODUCTS, MatrixRows, product

# The names of arguments, in order.
_NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.embedding: ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    **{f: tuple(inspect.signature(f).parameters) for f in (F.embedding, F.embedding_bag)},
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
_MATRIX_TRANSPOSES = torch.t, Tensor.t, Tensor.T.__get__  # type: ignore[attr-defined]
_TRANSPOSES = torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes
_PERMUTES = torch.permute, Tensor.permute
_COPIES = (
    *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.double, Tensor.float, Tensor.bfloat16),
    *(Tensor.half, Tensor.contiguous, Tensor.clone, torch.clone),
)
# Of what these are handed behind their first argument they ask the dtype or the shape alone.
_LIKE = Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as
_UNBINDS = torch.unbind, Tensor.unbind, Tensor.__iter__


@dataclasses.dataclass(frozen=True)
class View:
    """What a tensor shows of a weight.

    Attributes:
        weight: The weight.
        part: The number of the matrix of a stack that it is, None if it is the whole weight.
        turned: Whether its last two axes changed places.
    """

    weight: Tensor
    part: int | None = None
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """A call of a function, seen as the call of a layer.

    Attributes:
        x: The input.
        handed: The weight, or a view of it.
        view: What that shows of the weight.
        bias: The bias or None.
        kind: The kind of layer.
        rows: The rows of each matrix, if input and output are not simply a layer's.
    """

    x: Tensor
    handed: Tensor
    view: View
    bias: Tensor | None
    kind: LayerKind
    rows: Callable[[Tensor, Tensor, int], Iterator[MatrixRows]] | None = None


def views(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Any,
    output: Any,
    seen: View | None,
    *,
    whole: bool,
) -> list[tuple[Tensor, View]] | None:
    """What a call returns that shows a weight as well, as its first argument does, or None.

    A copy in another dtype shows it: so layers compute in a dtype that is not the weight's. A
    transpose shows it, and one matrix of a stack `(parts, ...)`. If `whole`, copies alone do.
    """
    if seen is None:
        return None
    shown, *others = args
    if function in _COPIES and _is_copy(output, shown):
        return [(output, seen)]
    if whole or kwargs:
        return None
    if _turns(function, shown.ndim, others):
        return [(output, dataclasses.replace(seen, turned=not seen.turned))]
    if shown.ndim != 3:
        return None
    if function in (Tensor.__getitem__, torch.select, Tensor.select):
        *axis, index = others
        if any(axis) or not _is_index(index):
            return None
        part = int(index) % len(shown)
        return [(output, dataclasses.replace(seen, part=part))]
    if function in _UNBINDS and not any(others):
        output = list(output)
        return [(one, dataclasses.replace(seen, part=i)) for i, one in enumerate(output)]
    return None


def asks_no_numbers(function: Callable[..., Any], of: Any, tensor: Tensor) -> bool:
    """Whether a call whose first argument is `of` does not depend on the numbers of a tensor."""
    return function in _LIKE and tensor is not of


def _is_copy(output: Any, shown: Tensor) -> bool:
    """Whether a tensor has the numbers of another, rounded, where its rows will be measured."""
    real = isinstance(output, Tensor) and output.is_floating_point()
    return real and output.device == shown.device and output.shape == shown.shape


def _turns(function: Callable[..., Any], ndim: int, others: Sequence[Any]) -> bool:
    """Whether a call exchanges the last two axes of a tensor of so many."""
    if function in _MATRIX_TRANSPOSES:
        return ndim == 2 and not others
    if function == Tensor.mT.__get__:  # type: ignore[attr-defined]
        return not others
    if function in _TRANSPOSES and len(others) == 2:
        return {axis % ndim for axis in others} == {ndim - 2, ndim - 1}
    if function in _PERMUTES:
        axes = others[0] if len(others) == 1 else others
        return [a % ndim for a in axes] == [*range(ndim - 2), ndim - 1, ndim - 2]
    return False


def _is_index(index: Any) -> bool:
    """Whether an index is one number, which the host has."""
    if isinstance(index, Tensor):
        return index.ndim == 0 and index.device.type == "cpu" and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def reading(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    view_of: Callable[[Any], View | None],
) -> Reading | None:
    """What layer a call is, or None if it is none that is known.

    Args:
        function: What is called.
        args: By position.
        kwargs: By name.
        view_of: What a tensor shows of a weight, None of others.
    """
    found = None
    if function in PRODUCTS:
        found = product(function, args, kwargs, lambda operand: view_of(operand) is not None)
    if found is not None:
        view = view_of(found.handed)
        assert view is not None
        if view.weight.ndim - (view.part is not None) == found.handed.ndim:
            own = Linear(transposed=found.contracts_last == view.turned)
            return Reading(found.x, found.handed, view, None, own, found.rows)
    names = _NAMES.get(function)
    if names is None or len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    x, handed, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(x, Tensor) or not isinstance(handed, Tensor):
        return None
    kind, view = _kind(function, handed, given), view_of(handed)
    if view is not None and view.turned:
        kind = None if kind is None else kind.of_transpose()
    if kind is None or view is None:
        return None
    bags = Bags.of(given, kind.ignored) if function is F.embedding_bag else None
    return Reading(x, handed, view, bias, kind, bags)


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
    if function is F.embedding_bag and (given.get("mode") == "max" or given["input"].is_nested):
        return None
    if function in (F.embedding, F.embedding_bag, torch.embedding):
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
    """The kind of a transposed convolution, None where windows fit more often."""
    kind = TransposedConvolution(size, stride, padding, dilation, groups)
    more = (output_padding,) * len(size) if isinstance(output_padding, int) else output_padding
    windows = kind.convolution.windows
    fits = all(n < window.stride for n, window in zip(more, windows, strict=True))
    return kind if fits else None
