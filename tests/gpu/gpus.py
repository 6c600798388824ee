"""The GPU as each library sees it, in the few words that the tests need.

With SINGD_GPU_SUBSTITUTE=1 in the environment the CPU stands for the GPU, and NumPy for CuPy: the
tests themselves can so be tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

import singd_core

SUBSTITUTE = os.environ.get("SINGD_GPU_SUBSTITUTE") == "1"


class NoGpuError(Exception):
    """Why a library cannot be tested here."""


@dataclass(frozen=True)
class Gpu:
    """One library on its first GPU.

    Attributes:
        name: Of the library.
        backend: Its name among `singd_core.testing.backends()`.
        to: An array of a NumPy array in a dtype, by its name.
        back: A NumPy array in float64.
        optimizer: The class of the pure optimizer.
        is_there: Whether an array is on the GPU.
        wait: Until all that was begun is done.
        reserved: Bytes that the library holds, None where it does not tell.
        no_wait: A context in which it is an error to wait for the GPU.
        wide: A context in which float64 exists.
    """

    name: str
    backend: str
    to: Callable[[Any, str], Any]
    back: Callable[[Any], np.ndarray]
    optimizer: type
    is_there: Callable[[Any], bool]
    wait: Callable[[], object]
    reserved: Callable[[], int | None]
    no_wait: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    wide: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoGpuError(str(error)) from None


def cupy() -> Gpu:
    """CuPy, or NumPy in its place."""
    if SUBSTITUTE:
        return Gpu(
            "numpy",
            "numpy",
            np.asarray,
            lambda x: np.asarray(x, np.float64),
            singd_core.Optimizer,
            lambda x: isinstance(x, np.ndarray | np.generic),
            lambda: None,
            lambda: 0,
        )
    ours, cp, cupyx = _imported("singd_cupy"), _imported("cupy"), _imported("cupyx")

    @contextlib.contextmanager
    def no_wait() -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, with nothing in its place
            with cupyx.allow_synchronize(False):
                yield

    return Gpu(
        "cupy",
        "cupy",
        cp.asarray,
        lambda x: x.get().astype(np.float64),
        ours.Optimizer,
        lambda x: isinstance(x, cp.ndarray),
        lambda: cp.cuda.Device().synchronize(),
        lambda: cp.get_default_memory_pool().total_bytes(),
        no_wait,
    )


def torch() -> Gpu:
    """torch on `cuda`, with what its frontend does without a wait."""
    torch, _ = _imported("torch"), _imported("singd_torch")
    if not SUBSTITUTE and not torch.cuda.is_available():
        raise NoGpuError(f"torch {torch.__version__} finds no GPU")
    device = "cpu" if SUBSTITUTE else "cuda"

    @contextlib.contextmanager
    def no_wait() -> Any:
        old = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(old)

    return Gpu(
        "torch",
        "torch" if SUBSTITUTE else "torch:cuda",
        lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype), device=device),
        lambda x: x.detach().cpu().double().numpy(),
        singd_core.Optimizer,
        lambda x: x.device.type == device,
        torch.cuda.synchronize if device == "cuda" else lambda: None,
        torch.cuda.memory_reserved if device == "cuda" else lambda: None,
        no_wait if device == "cuda" else contextlib.nullcontext,
    )


def jax() -> Gpu:
    """jax with a GPU as its default device."""
    jax, jnp = _imported("jax"), _imported("jax.numpy")
    if not SUBSTITUTE and jax.default_backend() not in ("gpu", "cuda", "rocm"):
        raise NoGpuError(f"jax {jax.__version__} finds no GPU: it runs on {jax.default_backend()}")
    new = hasattr(jax, "enable_x64")
    x64 = jax.enable_x64 if new else _imported("jax.experimental").enable_x64
    platform = "cpu" if SUBSTITUTE else "gpu"

    def wait() -> None:
        jax.block_until_ready(jnp.zeros(()) + 1.0)

    return Gpu(
        "jax",
        "jax",
        lambda x, dtype: jnp.asarray(x, dtype=dtype),
        lambda x: np.asarray(x, dtype=np.float64),
        singd_core.Optimizer,
        lambda x: next(iter(x.devices())).platform == platform,
        wait,
        lambda: (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"),
        lambda: jax.transfer_guard_device_to_host("disallow"),
        lambda: x64(True),
    )


LIBRARIES = {"cupy": cupy, "torch": torch, "jax": jax}


def available(name: str) -> Gpu | None:
    """The GPU of a library, or None."""
    try:
        return LIBRARIES[name]()
    except NoGpuError:
        return None
