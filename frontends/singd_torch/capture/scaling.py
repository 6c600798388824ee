"""Gradient scaling: what torch.amp.GradScaler multiplied the loss by."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from singd_torch.tensors import pieces


@dataclasses.dataclass(frozen=True)
class Scales:
    """The scale of the loss that is still in the gradients, and the one in the captured rows.

    Attributes:
        grads: The first of them, None if there is none.
        rows: The second.
        found_inf: A number that is not 0 if the scaler found gradients that were not finite, which
            they may be again by now, or None.
    """

    grads: Any = None
    rows: Any = 1.0
    found_inf: Any = None

    def sizes(self) -> list[Any]:
        """What is infinite if the scaler found gradients that were not finite."""
        if self.found_inf is None:
            return []
        if not isinstance(self.found_inf, Tensor) or pieces.on_host(self.found_inf):
            return [math.inf if float(self.found_inf) else 0.0]
        return [torch.where(self.found_inf != 0.0, math.inf, 0.0)]


@dataclasses.dataclass(frozen=True)
class Given:
    """The scale of the loss that a user told, and whether the gradients are without it already."""

    scale: Any
    unscaled: bool


def scales(optimizer: Any, given: Given | None) -> Scales:
    """The scales of a step; `given` is what the user told.

    A scaler sets `optimizer.grad_scale` and `optimizer.found_inf` for the time of the step; after
    `scaler.unscale_` it no longer hands its scale over, but the rows still have it.
    """
    scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if scale is not None:
        return Scales(scale, scale, found_inf)
    if found_inf is not None:  # the gradients are without it
        rows = _scale_of_caller() if given is None else given.scale
        return Scales(None, rows, found_inf)
    if given is None:
        return Scales()
    return Scales(None if given.unscaled else given.scale, given.scale)


def takes_scale() -> bool:
    """Whether the step takes gradients with a scale.

    It also takes them without. Lightning, which would not clip others, is told no: it then has them
    unscaled before.
    """
    asks = str(sys._getframe(2).f_globals.get("__name__"))
    return not asks.startswith(("lightning", "pytorch_lightning"))


def _scale_of_caller() -> Any:
    """The scale of the gradient scaler that takes this step, found among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return caller._get_scale_async()
        frame = frame.f_back
    raise RuntimeError("the scale of the loss is unknown: call optimizer.set_current_grad_scale")
