"""Models in parts on several processes: which of them can be trained, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from singd_torch.sharding.sharded import Sharded


def is_in_parts(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether several processes have parts of a tensor: then it is a DTensor.

    A parameter of another subclass is as whole as any.
    """
    if type(tensor) in (Tensor, nn.Parameter):  # compiled code then does not ask what is imported
        return False
    distributed = sys.modules.get("torch.distributed.tensor")  # else there are no parts
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def parted(
    params: Iterable[nn.Parameter],
    processes: dist.ProcessGroup | None,
    *,
    copies: bool,
    summed: bool,
) -> Sharded | None:
    """What parts the work of a step among processes, if parameters are in parts there.

    With `copies`, also if all of the `processes` have them whole. Without `processes` the parts
    tell which they are. Gradients are `summed` over them, or averaged.

    Raises:
        ValueError: If some that have parts are none of the processes.
    """
    parts = [p for p in params if is_in_parts(p)]
    if not parts and not copies:
        return None
    from singd_torch.sharding.boxes import check_has_parts, group_of_parts
    from singd_torch.sharding.sharded import Sharded

    if processes is not None:
        check_has_parts(processes, parts)
    group = group_of_parts(parts) if processes is None else processes
    return Sharded(group, summed=summed, in_parts=bool(parts))
