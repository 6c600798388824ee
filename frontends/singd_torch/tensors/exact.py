"""Mathematics in the dtypes of what it is about, also where a script's own is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def without_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no `torch.autocast` change the dtypes of products on the devices of these tensors."""
    with contextlib.ExitStack() as stack:
        for kind in {x.device.type for x in tensors}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
