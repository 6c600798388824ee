"""CuPy without a GPU: it imports, and makes arrays over foreign memory, but computes nothing.

Where CuPy is not installed these tests fail: `make test` installs it, except on macOS. (A folder
`tests/cupy` would itself be importable as `cupy` where there is none.)
"""

import contextlib
import sys
from unittest import mock

import numpy as np
import pytest
from array_api_compat import to_device

# On macOS only the tests that read source code are left.
collect_ignore_glob = ["test_[!n]*.py"] if sys.platform == "darwin" else []

if sys.platform != "darwin":
    import cupy

    with mock.patch.object(cupy.cuda, "is_available", return_value=True):
        import singd_cupy  # noqa: F401


@pytest.fixture
def elsewhere(monkeypatch):
    """`singd_cupy` computes on arrays of any library: it knows CuPy in these three functions."""
    from singd_cupy import _cuda

    def moved(x, device):
        return x if x.device == device else to_device(x, device)

    monkeypatch.setattr(_cuda, "device_of", lambda x: x.device)
    monkeypatch.setattr(_cuda, "at", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_cuda, "moved", moved)


@pytest.fixture
def foreign():
    """A function that makes a CuPy array over the memory of a NumPy array, on a device's number."""

    def make(x: np.ndarray, device: int = 0):
        memory = cupy.cuda.UnownedMemory(x.ctypes.data, x.nbytes, x, device_id=device)
        return cupy.ndarray(x.shape, x.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    return make
