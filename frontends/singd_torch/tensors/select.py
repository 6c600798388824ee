"""Numbers and choices of matrices along the first axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def spread(c: Tensor, like: Tensor) -> Tensor:
    """The numbers of matrices along the first axes, with the axes that they lack."""
    return c.view((*c.shape, *(1,) * (like.ndim - c.ndim)))


def either(ok: Tensor, new: Any, old: Any) -> Any:
    """What is new where it is to be kept, of matrices along the first axes if `ok` has any."""
    return new if new is old else torch.where(spread(ok, new), new, old)
