"""Arrays of other libraries as CuPy arrays."""

from __future__ import annotations

from typing import Any

import cupy


def from_dlpack(arrays: Any) -> Any:
    """CuPy arrays over the same memory, for arrays on a GPU of torch, jax or any other library.

    CuPy's current stream waits for what the other library has begun. The way back is the other
    library's own: `torch.from_dlpack(x)`, `jax.dlpack.from_dlpack(x)`, without a copy too.

    Args:
        arrays: An array, or a dictionary, list or tuple of them, nested as deep as you like; torch
            tensors detached.

    Returns:
        The same structure. Writing into its arrays writes into the others'; jax's must not be.
    """
    if isinstance(arrays, dict):
        return {name: from_dlpack(value) for name, value in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return type(arrays)(map(from_dlpack, arrays))
    return cupy.from_dlpack(arrays)
