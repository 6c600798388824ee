"""What CuPy does in its own way: the core's element-wise chains as one kernel each, no waits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cupy

from singd_core._kernels import Kernels


@functools.cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`cupy.fuse` of a chain; as it is for arrays of several dtypes, which that does not cast."""
    kernel = cupy.fuse(function)

    def run(*arguments: Any) -> Any:
        dtypes = {x.dtype for x in arguments if isinstance(x, cupy.ndarray)}
        return (kernel if len(dtypes) == 1 else function)(*arguments)

    return run


# `clip` of array-api-compat asks the device how many numbers are cut, and waits to know.
KERNELS = Kernels(fuse=fused, maximum=cupy.maximum, minimum=cupy.minimum)
