"""Whether CuPy can be used at all, and on which device and stream it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from singd_core._array import Array

_REMEDY = "without a GPU, singd_core.Optimizer runs on NumPy arrays"


def require() -> None:
    """Check that CuPy is installed and finds a GPU.

    Raises:
        ImportError: Saying which of both is missing.
    """
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "singd_cupy needs CuPy: pip install cupy-cuda13x, or the package for your version of "
            f"CUDA; {_REMEDY} ({error})"
        ) from None
    if not cupy.cuda.is_available():
        raise ImportError(
            f"singd_cupy: CuPy {cupy.__version__} is installed, but finds no GPU or no CUDA "
            f"driver (nvidia-smi shows both); {_REMEDY}"
        )


def device_of(x: Array) -> Any:
    """The device of a CuPy array.

    Raises:
        TypeError: If it is an array of another library.
    """
    import cupy

    if isinstance(x, cupy.ndarray):
        return x.device
    raise TypeError(
        f"singd_cupy takes CuPy arrays, not {type(x).__module__}.{type(x).__name__}: cupy.asarray "
        "copies NumPy's, singd_cupy.from_dlpack takes torch's and jax's on a GPU as they are"
    )


def at(device: Any) -> AbstractContextManager[Any]:
    """A context in which arrays are made and kernels run on a device, on its current stream."""
    return device  # type: ignore[no-any-return]


def moved(x: Array, device: Any) -> Array:
    """`x` on a device: the streams of both devices wait for each other, the host for none."""
    source = device_of(x)
    if source == device:
        return x
    import cupy

    with source:  # a copy of what is not contiguous would else begin after the event
        x = x if x.flags.c_contiguous else cupy.ascontiguousarray(x)
        written = cupy.cuda.get_current_stream().record()
    with device:
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(written)
        copy = cupy.asarray(x)
        read = stream.record()
    with source:  # whose pool may give the memory of `x` away as soon as Python drops it
        cupy.cuda.get_current_stream().wait_event(read)
    return copy
