"""What all tests share."""

import gc
import itertools
import os
import tempfile
from importlib import metadata
from typing import Any

import pytest
from hypothesis import settings

# XLA's CPU compiler dominates the tests that use jax: without its optimizer a step compiles
# in 0.3 s in place of 3. The pinned jaxlib knows the flags; another may not. They only act before
# jax is imported.
if metadata.version("jaxlib").startswith("0.10."):
    _FAST = (
        "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}"

# What one test has compiled the next one loads. Every process has a folder of its own: jax may read
# a file while another process still writes it.
_compiled = tempfile.TemporaryDirectory(prefix="jax-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure() -> None:
    _compiled.cleanup()


# No time limit an example: the first call of a library, and a busy machine, are slow.
# The same examples in every run, so that a failure comes from the change at hand.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# One process runs all tests of such a file: they share what was compiled, or a fixture of 10 s.
_TOGETHER = "jax_frontend/", "test_distributed.py"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if any(name in file for name in _TOGETHER) else nodeid

    return Scheduling(config, log)


# A full collection walks through all that libraries keep, compiled functions above all: late in the
# run 2 s each time. Every so often what is left after one is set aside.
_TESTS = 100
_run = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    if next(_run) % _TESTS == 0:
        gc.collect()
        gc.freeze()
