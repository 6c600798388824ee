"""The array libraries that are installed, each with its dtypes and its way to and from NumPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from singd_core._array import Array

ALL = ("float64", "float32", "bfloat16", "float16")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True)
class Backend:
    """An array library on one device.

    Attributes:
        name: The name, such as `"torch"`. A device that is not the default follows after a colon.
        dtypes: The names of the dtypes to test, the widest first.
        to: A function that makes an array from a NumPy array and the name of a dtype.
        back: A function that makes a NumPy array in float64 from an array.
        active: A context in which all of the library's dtypes exist.
    """

    name: str
    dtypes: tuple[str, ...]
    to: Callable[[np.ndarray, str], Array]
    back: Callable[[Array], np.ndarray]
    active: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def __repr__(self) -> str:
        return self.name

    @property
    def library(self) -> str:
        """The name without the device."""
        return self.name.partition(":")[0]


def _numpy() -> Backend:
    def to(x: np.ndarray, dtype: str) -> Array:
        new = np.array(x, dtype=dtype)
        new.flags.writeable = False  # whoever changes an input in place is found out
        return new

    return Backend("numpy", ("float64", "float32", "float16"), to, _float64)


def _strict() -> Backend:
    xp = importlib.import_module("array_api_strict")
    device, cpu = xp.Device("device1"), xp.Device("CPU_DEVICE")
    return Backend(
        "strict:device1",
        ("float64", "float32"),
        lambda x, dtype: xp.asarray(x, dtype=getattr(xp, dtype), device=device),
        lambda x: _float64(xp.asarray(x, device=cpu)),
    )


def _torch(device: str = "cpu") -> Backend:
    torch = importlib.import_module("torch")
    return Backend(
        "torch" if device == "cpu" else f"torch:{device}",
        ALL,
        lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype), device=device),
        lambda x: x.detach().cpu().double().numpy(),
    )


def _torch_cuda() -> Backend:
    if not importlib.import_module("torch").cuda.is_available():
        raise ImportError("torch sees no GPU")
    return _torch("cuda")


def _jax() -> Backend:
    jax = importlib.import_module("jax")
    jnp = importlib.import_module("jax.numpy")
    return Backend(
        "jax",
        ALL,
        lambda x, dtype: jnp.asarray(x, dtype=dtype),
        _float64,
        # only within the context: the caller's configuration stays as it is
        lambda: jax.enable_x64(True),
    )


def _cupy() -> Backend:
    cupy = importlib.import_module("cupy")
    try:
        cupy.zeros(1)
    except Exception as error:
        raise ImportError("CuPy cannot allocate") from error
    return Backend("cupy", ("float64", "float32", "float16"), cupy.asarray, _from_cupy)


def _from_cupy(x: Array) -> np.ndarray:
    return np.asarray(x.get(), dtype=np.float64)


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


@functools.cache
def backends() -> tuple[Backend, ...]:
    """The array libraries that are installed; NumPy, the oracle, is the first.

    NumPy with read-only arrays, array-api-strict on its fake `device1`, torch on the CPU and on a
    GPU, jax, and CuPy where it can allocate.
    """
    found = []
    for make in (_numpy, _strict, _torch, _torch_cuda, _jax, _cupy):
        with contextlib.suppress(ImportError):
            found.append(make())
    return tuple(found)


def backend(name: str) -> Backend | None:
    """The backend of a name, or None if its library is not installed."""
    return next((b for b in backends() if b.name == name), None)
