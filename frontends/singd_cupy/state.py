"""`singd_core.state` through pinned memory: the names in a checkpoint are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cupy
import cupyx

from singd_core import state as core
from singd_core.optimizer import State


def flatten(state: State) -> dict[str, Any]:
    """`singd_core.state.flatten`, its arrays copied into pinned host memory: NumPy arrays.

    All copies are begun before one is waited for.
    """
    flat, streams = core.flatten(state), {}
    for name, x in flat.items():
        if isinstance(x, cupy.ndarray):
            with x.device:
                streams[x.device.id] = cupy.cuda.get_current_stream()
                flat[name] = x.get(out=cupyx.empty_pinned(x.shape, x.dtype), blocking=False)
    for stream in streams.values():
        stream.synchronize()
    return flat


def unflatten(template: State, flat: Mapping[str, Any]) -> State:
    """`singd_core.state.unflatten`: each array goes to the device of the template's.

    bfloat16, which `numpy.savez` reads back as two bytes without a meaning, gets its meaning from
    the template. CuPy copies from any host memory through pinned memory of its own.
    """
    dtypes = {name: x.dtype for name, x in core.flatten(template).items() if hasattr(x, "dtype")}
    known = {
        name: x.view(dtypes[name]) if name in dtypes and x.dtype.kind == "V" else x
        for name, x in flat.items()
    }
    return core.unflatten(template, known)
