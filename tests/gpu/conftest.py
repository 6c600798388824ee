"""Tests that need a GPU: `make test-gpu` runs them, `make test` does not."""

import pytest

try:
    import array_api_compat  # noqa: F401
except ImportError:
    pytest.exit(
        "array-api-compat, which singd_core needs, is not installed: put it on PYTHONPATH", 2
    )

from gpus import LIBRARIES, NoGpuError


@pytest.fixture
def of():
    """A function that gives the GPU of a library, and skips the test where there is none."""

    def gpu(name: str):
        try:
            return LIBRARIES[name]()
        except NoGpuError as error:
            pytest.skip(f"no GPU for {name}: {error}")

    return gpu


@pytest.fixture(params=LIBRARIES)
def gpu(request, of):
    """The GPU of each library."""
    found = of(request.param)
    with found.wide():
        yield found
