"""Models that are copied or saved while an optimizer watches them: its hooks are left behind."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Which of the hooks are called in which way, by the same numbers.
_OURS = f"{__name__.partition('.')[0]}."
_WAYS = tuple(f"{name}_{way}" for name in _HOOKS for way in ("with_kwargs", "always_called"))


def leave_hooks_behind(model: nn.Module) -> None:
    """Let copies and pickles of this model be as if it had no optimizer.

    What they are made of is decided by class, and where there are no hooks to leave behind it is
    what it was.
    """
    for module in model.modules():
        if any(map(_is_ours, _hooks(vars(module)))):
            copyreg.dispatch_table.setdefault(type(module), _reduced)


def when_complete(model: nn.Module, then: Callable[[], None]) -> None:
    """Call a function when a copy of a model, which is still empty, has been given its state."""

    def set_state(state: dict[str, Any]) -> None:
        del vars(model)["__setstate__"]
        model.__setstate__(state)  # type: ignore[no-untyped-call]
        then()

    vars(model)["__setstate__"] = set_state  # `copy` and `pickle` ask the object for it


def _reduced(module: nn.Module) -> Any:
    """What `copy` and `pickle` make a module anew from."""
    make, arguments, *others = cast("tuple[Any, ...]", module.__reduce_ex__(2))
    if others and isinstance(others[0], dict):
        others[0] = others[0] | _without_hooks(others[0])
    return make, arguments, *others


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module that have to be others without our hooks."""
    ours = {key for name in _HOOKS for key, hook in state.get(name, {}).items() if _is_ours(hook)}
    return {
        name: OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
        for name in (*_HOOKS, *_WAYS)
        if name in state
    }


def _hooks(state: dict[str, Any]) -> list[Any]:
    return [hook for name in _HOOKS for hook in state.get(name, {}).values()]


def _is_ours(hook: Any) -> bool:
    """Whether a hook is an object of this package, or a method of one."""
    return type(getattr(hook, "__self__", hook)).__module__.startswith(_OURS)
