"""The norms of a step's gradients, whose sum tells whether all of them are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd_torch.tensors import pieces


def norms(gradients: Mapping[nn.Parameter, Tensor], scale: Any = None) -> dict[nn.Parameter, Any]:
    """The norm of each gradient, over the scale that is in all of them.

    It is a number if the host need not wait for it, else 0-d.
    """
    alike: dict[Any, list[nn.Parameter]] = {}
    for p, g in gradients.items():
        alike.setdefault((g.device, g.dtype), []).append(p)
    found: dict[nn.Parameter, Any] = {}
    for params in alike.values():
        given = [gradients[p] for p in params]
        wide = torch.float32 if given[0].dtype.itemsize < 4 else None
        each = torch._foreach_norm(given, 2, wide)
        row = torch.stack(each)
        row = row if scale is None else row / _on(row.device, scale)
        found |= zip(params, row.tolist() if pieces.on_host(row) else row.unbind(), strict=True)
    return found


def total(sizes: Sequence[Any]) -> Any:
    """The sum of numbers and tensors: a number, or 0-d on the first accelerator among them."""
    alike: dict[Any, list[Tensor]] = {}
    for x in sizes:
        if isinstance(x, Tensor):
            alike.setdefault((x.device, x.dtype, x.shape), []).append(x)
    known: float = sum(x for x in sizes if not isinstance(x, Tensor))
    sums = [pieces.read(torch.stack(tensors).sum()) for tensors in alike.values()]
    known += sum(x for x in sums if not isinstance(x, Tensor))
    on_device = [x for x in sums if isinstance(x, Tensor)]
    return sum(x.to(on_device[0].device) for x in on_device) + known if on_device else known


def _on(device: torch.device, scale: Any) -> Any:
    return scale.to(device) if isinstance(scale, Tensor) else scale
