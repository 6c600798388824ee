"""Whether processes that have copies of a weight have the same gradient of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from singd_torch._distributed import apart, device_of_flags
from singd_torch._warnings import listed
from singd_torch.tensors import finite

# By how much norms of one gradient may differ, as a share of it and of all gradients: copies that
# process by process compute the same differ by rounding.
_OF_ITSELF, _OF_ALL = 1e-2, 1e-4

_DIFFER = (
    "the processes have different gradients of {}, and one process steps each weight for all, with "
    "the gradient that it has. Average gradients before each step, as DistributedDataParallel does "
    "without a hook such as post_localSGD_hook, and with parameters that it is not told to ignore; "
    "or leave out shard=True, so that each process steps its own copy"
)


class Alike:
    """Compares gradients in the steps 1, 2, 4, 8, ...: the host waits for what it is told."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._steps, self._next = group, 0, 1

    def check(self, copies: Mapping[nn.Parameter, str]) -> None:
        """Refuse gradients of copies that differ; all processes call it in each step.

        Args:
            copies: The name of each parameter that all processes have whole.

        Raises:
            RuntimeError: Naming the parameters. All processes raise it.
        """
        self._steps += 1
        if self._steps < self._next or not copies:
            return
        self._next *= 2
        norms, _ = finite.norms({p: p.grad for p in copies if p.grad is not None})
        device = next(iter(copies)).device
        own = [torch.as_tensor(norms.get(p, -1.0), device=device).float() for p in copies]
        found = torch.stack(own).to(device_of_flags(self._group, device)).nan_to_num()
        largest = torch.cat([found, -found])  # and the smallest
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=apart(self._group))
        most, least = largest[: len(own)], -largest[len(own) :]
        allowed = _OF_ITSELF * most.abs() + _OF_ALL * most.norm()
        differ = [
            name
            for name, other in zip(copies.values(), (most - least > allowed).tolist(), strict=True)
            if other
        ]
        if differ:
            raise RuntimeError(_DIFFER.format(listed(differ)))
