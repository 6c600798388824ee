"""Probes inside torch.compile: the backward graph calls an operator that hands the rows on."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from singd_torch._uncompiled import uncompiled


class _Takes(Protocol):
    def take(self, x: Tensor, g: Tensor) -> Any: ...

    def take_some(self, x: Tensor, g: Tensor, samples: int) -> Any: ...


# Before, torch cannot compile operators with effects in the backward pass of a function.
SUPPORTED = torch.__version__ >= "2.13"  # compares versions, not text

# By the number in the handle. A compiled graph outlives the optimizer, and must not keep it alive.
_TAPS: weakref.WeakValueDictionary[int, _Takes] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()

# The handle is a tensor and no number, so that one graph serves all modules of a kind.
_ROWS = "singd_torch::rows"
_TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]
torch.library.define(_ROWS, "(Tensor handle, Tensor x, Tensor g, SymInt samples) -> ()", tags=_TAGS)


@uncompiled("a hook of backward passes")
def _rows(handle: Tensor, x: Tensor, g: Tensor, samples: int) -> None:
    tap = _TAPS.get(int(handle))  # on the host: nothing is waited for
    if tap is not None:
        tap.take(x, g) if samples < 0 else tap.take_some(x, g, samples)


torch.library.impl(_ROWS, "default", _rows)
torch.library.register_fake(_ROWS, lambda handle, x, g, samples: None)
# A compiler must neither drop calls of it nor merge equal ones.
_register_effectful_op(torch.ops.singd_torch.rows.default, _EffectType.ORDERED)


class _Probe(torch.autograd.Function):
    """The identity on a layer's output; its backward passes input and gradient to the operator.

    A compiler removes the copy, which an in-place activation behind it needs before that. Where
    tensor parallelism has parts of both, each process hands on some of the samples along an axis.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, handle: Tensor, axis: int | None) -> Tensor:
        ctx.save_for_backward(x, handle)
        ctx.axis = axis
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, handle), (g,) = ctx.saved_tensors, grads
        if ctx.axis is None:
            torch.ops.singd_torch.rows(handle, x, g, -1)
        else:
            from singd_torch.sharding.meter import by_samples

            own = by_samples(x, ctx.axis), by_samples(g, ctx.axis)
            torch.ops.singd_torch.rows(handle, *own, x.shape[ctx.axis])
        return g, None, None, None


def handle(tap: _Takes) -> Tensor:
    """What stands for a tap in a compiled graph, as long as it lives."""
    number = next(_NUMBERS)
    _TAPS[number] = tap
    return torch.tensor(number, device="cpu")


def tell_apart(owner: Any, weight: Tensor) -> None:
    """Keep graphs without probes from serving a module that has a tap, until the end of the owner.

    Compiled code does not look whether hooks were added, but whether a tensor was marked. The mark
    says that the shape of the weight is fixed, which it is.
    """
    marks = _MARKS.get(id(vars(weight)))
    if marks is None:
        marks = _MARKS[id(vars(weight))] = _Marks(weight)
    if id(owner) not in marks.owners:
        marks.owners.add(id(owner))
        weakref.finalize(owner, marks.leave, id(owner))


class _Marks:
    """The attributes of a weight that tell it apart: they go with the last owner of its taps.

    Attributes:
        owners: The owners that are there, by identity.
    """

    def __init__(self, weight: Tensor) -> None:
        """The weight is not kept, and torch swaps no tensor that has a weak reference."""
        self._attributes, before = vars(weight), set(vars(weight))
        torch._dynamo.mark_static(weight)
        self._names = set(self._attributes) - before
        self.owners: set[int] = set()

    def leave(self, owner: int) -> None:
        """Know that an owner has ended."""
        self.owners.remove(owner)
        if not self.owners:
            del _MARKS[id(self._attributes)]
            for name in self._names:
                self._attributes.pop(name, None)


# By the identity of a weight's attributes.
_MARKS: dict[int, _Marks] = {}


def probed(x: Tensor, output: Tensor, handle: Tensor, axis: int | None) -> Tensor:
    """The output with a probe on it; `axis` counts the samples, if it is in parts."""
    return _Probe.apply(output, x.detach(), handle, axis)  # type: ignore[no-untyped-call,no-any-return]
