"""Many small tasks of different kinds, each a function that trains by a given optimizer."""

from __future__ import annotations

import math

import many_tasks_fields
import many_tasks_games
import many_tasks_images
import many_tasks_parameters
import many_tasks_sequences
import many_tasks_tables
import torch
from many_tasks_common import Task
from noisy import Build

TASKS: dict[str, Task] = {
    **many_tasks_fields.TASKS,
    **many_tasks_images.TASKS,
    **many_tasks_parameters.TASKS,
    **many_tasks_tables.TASKS,
    **many_tasks_sequences.TASKS,
    **many_tasks_games.TASKS,
}


def train(task: str, build: Build, seed: int, steps: int | None = None) -> float:
    """Train a task.

    Args:
        task: Its name.
        build: Makes the optimizer of a model, and of the number of steps for a schedule.
        seed: Of the model's start and of all that is drawn.
        steps: Of training; the task's own if none are given.

    Returns:
        A loss, or another number of which less is better; infinite where the run went astray.
    """
    torch.manual_seed(seed)
    try:
        found = TASKS[task].run(build, steps or TASKS[task].steps)
    except torch.linalg.LinAlgError:  # of a kernel that is not finite
        return math.inf
    return found if math.isfinite(found) else math.inf
