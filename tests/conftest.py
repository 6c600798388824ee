"""What all tests share."""

import gc
import itertools
import os
from importlib import metadata

from hypothesis import settings

# XLA's CPU compiler dominates the tests that use jax: without its optimizer a step compiles
# in 0.4 s in place of 3. The flags are those of the pinned jaxlib; another may not know them. They
# only act before jax is imported.
if metadata.version("jaxlib").startswith("0.10."):
    _FAST = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}"

# No time limit an example: the first call of a library, and a busy machine, are slow.
# The same examples in every run, so that a failure is that of the change at hand.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# A full collection walks through all that libraries keep, compiled functions above all: late in the
# run 2 s each time. Every so often what is left after one is set aside.
_TESTS = 100
_run = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    if next(_run) % _TESTS == 0:
        gc.collect()
        gc.freeze()
