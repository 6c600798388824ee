"""Models in parts on several processes: which of them can be trained, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from singd_torch.sharding.sharded import Sharded


def sharded(params: Iterable[nn.Parameter]) -> Sharded | None:
    """What parts the work of a step among processes, if the parameters are in parts there."""
    tensor = sys.modules.get("torch.distributed.tensor")  # else there are none
    if tensor is None:
        return None
    parts = [p for p in params if isinstance(p, tensor.DTensor)]
    if not parts:
        return None
    from singd_torch.sharding.boxes import group_of_parts
    from singd_torch.sharding.sharded import Sharded

    return Sharded(group_of_parts(parts))
