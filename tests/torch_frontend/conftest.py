"""What the tests of the torch frontend share."""

from collections.abc import Iterator

import pytest
import torch
import torchvision_on_cpu  # noqa: F401


@pytest.fixture(autouse=True)
def fresh_seed() -> Iterator[None]:
    """Every test draws the same numbers, alone or after others, and leaves the generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Nothing is compiled before the test and after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
