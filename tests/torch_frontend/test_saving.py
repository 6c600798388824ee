"""The `save` of docs/saving.md leaves a whole checkpoint, whenever the process is killed."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from singd_torch import SINGD

PAGE = Path(__file__).parents[2] / "docs" / "saving.md"


def documented_save() -> Callable[[Any, Path], None]:
    found = re.search(r"^import os\n.*?(?=^model = )", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[0], names)
    save: Callable[[Any, Path], None] = names["save"]
    return save


def numbered_state(number: int) -> dict[str, Any]:
    """A state of a megabyte, whose every tensor holds the number."""
    torch.manual_seed(0)
    model = nn.Linear(400, 400)
    optimizer = SINGD(model, structures="dense", lr=0.0)
    model(torch.randn(8, 400)).square().mean().backward()
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    for entries in state["state"].values():
        for tensor in entries.values():
            tensor.fill_(number)
    return state


def save_again_and_again(path: Path, begun: Any) -> None:
    save = documented_save()
    states = [numbered_state(number) for number in range(2)]
    begun.set()
    for number in range(10**6):
        save(states[number % 2], path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are killed")
def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    context = multiprocessing.get_context("forkserver")  # a fork of this process has JAX's threads
    for attempt in range(8):
        begun = context.Event()
        process = context.Process(target=save_again_and_again, args=(path, begun))
        process.start()
        assert begun.wait(60.0)
        deadline = time.monotonic() + 30.0
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.13 + 0.011 * attempt)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        saved = torch.load(path, weights_only=True)["state"]
        numbers = {tensor.unique().item() for e in saved.values() for tensor in e.values()}
        assert len(numbers) == 1
        assert numbers <= {0.0, 1.0}
