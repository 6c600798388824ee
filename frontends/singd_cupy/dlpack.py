"""Arrays of other libraries as CuPy arrays."""

from __future__ import annotations

from typing import Any

import cupy


def from_dlpack(arrays: Any) -> Any:
    """CuPy arrays over the same memory, for arrays on a GPU of torch, jax or any other library.

    CuPy's current stream waits for the work that the other library has begun. For the way back,
    use the other library: `torch.from_dlpack(x)`, `jax.dlpack.from_dlpack(x)`, without a copy too.

    Args:
        arrays: An array, or a dictionary, list or tuple of arrays, nested as deep as you like.
            Torch tensors must be detached.

    Returns:
        The same structure. Writing into its arrays writes into the memory of the others. You must
        not write into arrays of jax.
    """
    if isinstance(arrays, dict):
        return {name: from_dlpack(value) for name, value in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        found = map(from_dlpack, arrays)
        return type(arrays)(*found) if hasattr(arrays, "_fields") else type(arrays)(found)
    return cupy.from_dlpack(arrays)
