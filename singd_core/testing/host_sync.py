"""Finds what would make the host wait for a GPU, with array-api-strict in its place."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from singd_core._array import Array


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Forbid array-api-strict what would make the host wait for a GPU.

    Strict allows `float(x)`, `if x:` and the like on its fake devices, and shapes that depend
    on data; a GPU pays for them.
    """
    xp: ModuleType = importlib.import_module("array_api_strict")
    kind, cpu = type(xp.zeros(1)), xp.Device("CPU_DEVICE")
    old = {
        f"__{n}__": getattr(kind, f"__{n}__") for n in ("bool", "int", "float", "complex", "index")
    }

    def guarded(name: str) -> Callable[[Array], Any]:
        def method(self: Array) -> Any:
            if self.device != cpu:
                raise RuntimeError(
                    f"{name} of an array on {self.device}: the host waits for the device"
                )
            return old[name](self)

        return method

    for name in old:
        setattr(kind, name, guarded(name))
    try:
        with xp.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False):
            yield
    finally:
        for name, method in old.items():
            setattr(kind, name, method)
