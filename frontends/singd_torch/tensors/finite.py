"""The norms of a step's gradients, whose sum tells whether all of them are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd_core.late import ROOM
from singd_torch.tensors import pieces
from singd_torch.tensors.norms import each_norm


def norms(
    gradients: Mapping[nn.Parameter, Tensor], scale: Any = None
) -> tuple[dict[nn.Parameter, Any], list[Any]]:
    """The norm of each gradient, over the scale that is in all of them; and rows of all norms.

    The rows are multiplied until they are infinite where sums of squares would be. A norm is a
    number if the host need not wait for it, else 0-d.
    """
    alike: dict[Any, list[nn.Parameter]] = {}
    for p, g in gradients.items():
        alike.setdefault((g.device, g.dtype), []).append(p)
    found: dict[nn.Parameter, Any] = {}
    rows: list[Any] = []
    for params in alike.values():
        given = [gradients[p] for p in params]
        each = each_norm(given)
        row = torch.stack(each)
        if scale is not None:
            row = row / (scale.to(row.device) if isinstance(scale, Tensor) else scale)
            each = row.unbind()
        known = row * _room(row.dtype)
        own = row.tolist() if pieces.on_host(row) else each
        rows += known.tolist() if pieces.on_host(row) else [known]
        found |= zip(params, own, strict=True)
    return found, rows


def total(sizes: Sequence[Any]) -> Any:
    """The sum of numbers and tensors: a number, or 0-d on the first accelerator among them."""
    alike: dict[Any, list[Tensor]] = {}
    for x in sizes:
        if isinstance(x, Tensor):
            alike.setdefault((x.device, x.dtype), []).append(x.reshape(-1))
    known: float = sum(x for x in sizes if not isinstance(x, Tensor))
    rows = [torch.cat(row) if len(row) > 1 else row[0] for row in alike.values()]
    sums = [pieces.read(row.sum()) for row in rows]
    known += sum(x for x in sums if not isinstance(x, Tensor))
    on_device = [x for x in sums if isinstance(x, Tensor)]
    if not on_device:
        return known
    found, *others = on_device
    for x in others:
        found = found + x.to(found.device)
    return found if known == 0.0 else found + known


def has_room(norm: Any, dtype: torch.dtype) -> bool:
    """Whether sums of squares of a gradient of this norm stay in the range of its numbers."""
    wide = torch.promote_types(dtype, torch.float32)
    return math.isfinite(norm) and float(norm) * _room(wide) <= torch.finfo(wide).max


def _room(dtype: torch.dtype) -> float:
    room: float = ROOM**0.5 * torch.finfo(dtype).max ** 0.5
    return room
