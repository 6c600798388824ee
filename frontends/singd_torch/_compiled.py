"""Probes inside torch.compile: the backward graph calls an operator that hands the rows on."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class _Takes(Protocol):
    def take(self, x: Tensor, g: Tensor) -> None: ...


# By the number in the handle. A compiled graph outlives the optimizer, and must not keep it alive.
_TAPS: weakref.WeakValueDictionary[int, _Takes] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()

# The handle is a tensor and no number, so that one graph serves all modules of a kind. It is
# declared as changed, though it is not: a compiler must neither drop, merge nor reorder the calls.
_ROWS = "singd_torch::rows"
_TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]
torch.library.define(_ROWS, "(Tensor(a!) handle, Tensor x, Tensor g) -> ()", tags=_TAGS)


@torch.library.impl(_ROWS, "default")
def _rows(handle: Tensor, x: Tensor, g: Tensor) -> None:
    tap = _TAPS.get(int(handle))  # on the host: nothing is waited for
    if tap is not None:
        tap.take(x, g)


@torch.library.register_fake(_ROWS)
def _nothing(handle: Tensor, x: Tensor, g: Tensor) -> None:
    return None


class _Probe(torch.autograd.Function):
    """The identity on a layer's output; its backward passes input and gradient to the operator.

    A compiler removes the copy, which an in-place activation behind it needs before that.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, handle: Tensor) -> Tensor:
        ctx.save_for_backward(x, handle)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, handle), (g,) = ctx.saved_tensors, grads
        torch.ops.singd_torch.rows(handle, x, g)
        return g, None, None


def handle(tap: _Takes) -> Tensor:
    """What stands for a tap in a compiled graph, as long as it lives."""
    number = next(_NUMBERS)
    _TAPS[number] = tap
    return torch.tensor(number, device="cpu")


def probed(x: Tensor, output: Tensor, handle: Tensor) -> Tensor:
    """The output with a probe on it."""
    return _Probe.apply(output, x.detach(), handle)  # type: ignore[no-untyped-call,no-any-return]
