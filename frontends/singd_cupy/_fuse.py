"""The core's element-wise chains as one kernel each."""

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


KERNELS = Kernels(fuse=fused)
