"""Modes of calls of modules that have ended, and that no hook has left."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode


def leave_ended() -> None:
    """Leave the modes of calls that a KeyboardInterrupt has ended, or what else is no Exception.

    torch calls hooks after them only where an Exception ends a call. A mode that was entered for a
    call has its frame as `call`, and `forget` makes it unknown to what has entered it.
    """
    if not torch._C._len_torch_function_stack():
        return
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    ended = [mode for mode in stack if not _is_running(getattr(mode, "call", None))]
    if not ended:
        return
    for _ in stack:
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in stack:
        if any(mode is other for other in ended):
            mode.forget()
        else:
            _push_mode(mode)  # type: ignore[no-untyped-call]


def _is_running(call: Any) -> bool:
    """Whether the call of a frame goes on in this thread; other modes have none, and do."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None or not isinstance(call, FrameType)
