"""What runs as it is written where torch.compile meets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(reason: str) -> Callable[[_Function], _Function]:
    """Let a function make no graph; the reason is in the error of who asks for one."""

    def disabled(function: _Function) -> _Function:
        found: _Function = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
        return found

    return disabled
