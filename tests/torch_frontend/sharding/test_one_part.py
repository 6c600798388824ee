"""What one process has of a state that is parted is no state of a whole model."""

from pathlib import Path

import gloo
import models
import pytest
import torch
from runs import NAME, Run

from singd_torch import SINGD


def save_one_part(rank: int, world: int, folder: str) -> None:
    run = Run(rank, world)
    optimizer = run.build()
    models.train(run.model, optimizer, models.data(NAME)[:2], rank, world)
    state = optimizer.state_dict()  # all processes call it
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")


def load_it(rank: int, world: int, folder: str) -> None:
    state = torch.load(f"{folder}/state.pt", weights_only=False)
    optimizer = SINGD(models.new(NAME), **models.settings(NAME))
    with pytest.raises(ValueError, match=r"is one process's part .*full_state_dict=True"):
        optimizer.load_state_dict(state)


def test_one_process_cannot_go_on_from_the_part_of_another(tmp_path: Path) -> None:
    gloo.run(2, save_one_part, str(tmp_path))
    gloo.run(2, load_it, str(tmp_path))
