"""The array libraries that the rows of a layer must come out of alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Backend:
    name: str
    array: Callable[[np.ndarray], Any]  # from NumPy float64
    numpy: Callable[[Any], np.ndarray]
    run: Callable[..., Any]  # calls a function with arrays: under jit in JAX, which is faster
    tolerance: float  # relative to the largest entry: some hundred roundings


def call(f: Callable[..., Any], *arrays: Any) -> Any:
    return f(*arrays)


def _numpy() -> Backend:
    return Backend("numpy", np.asarray, np.asarray, call, 1e-13)


def _strict() -> Backend:
    xp = pytest.importorskip("array_api_strict")
    device, cpu = xp.Device("device1"), xp.Device("CPU_DEVICE")

    def to_numpy(x: Any) -> np.ndarray:
        assert x.device == device
        return np.asarray(x.to_device(cpu))

    return Backend("strict", lambda x: xp.asarray(x, device=device), to_numpy, call, 1e-13)


def _torch() -> Backend:
    torch = pytest.importorskip("torch")
    return Backend("torch", torch.asarray, lambda x: x.numpy(), call, 1e-13)


def _jax() -> Backend:
    jax = pytest.importorskip("jax")

    def run(f: Callable[..., Any], *arrays: Any) -> Any:
        return jax.jit(f)(*arrays)

    def array(x: np.ndarray) -> Any:
        return jax.numpy.asarray(x, dtype=np.float32)

    return Backend("jax", array, np.asarray, run, 1e-5)


@pytest.fixture(params=[_numpy, _strict, _torch, _jax], ids=lambda make: make.__name__[1:])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
