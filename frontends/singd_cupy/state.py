"""`singd_core.state` through pinned memory: the names in a checkpoint are the same.

`unflatten` is the core's: CuPy copies from any host memory through pinned memory of its own.
"""

from __future__ import annotations

from typing import Any

import cupy
import cupyx

from singd_core import state as core
from singd_core._layer_state import State
from singd_core.state import unflatten as unflatten


def flatten(state: State) -> dict[str, Any]:
    """`singd_core.state.flatten`, its arrays copied into pinned host memory: NumPy arrays.

    All copies begin before the host waits for one.
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
