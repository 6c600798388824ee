"""What the tasks of `many.py` have in common: a task, a training loop, batches of digits."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import task_data
import torch
from noisy import Build
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        title: What it is, for the tables.
        run: Trains with an optimizer for a number of steps, and gives a number: less is better.
        steps: Of training.
        needs: A file that has to be there.
    """

    title: str
    run: Callable[[Build, int], float]
    steps: int
    needs: Path | None = None


def history(build: Build, model: nn.Module, steps: int, loss: Callable[[], Tensor]) -> list[float]:
    """Train a model by a loss that draws its own batch: the loss of each step."""
    optimizer, losses = build(model, steps), []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss()
        losses.append(found.item())
        if not math.isfinite(losses[-1]):
            return [math.inf]
        found.backward()
        optimizer.step()
    return losses


def fitted(build: Build, model: nn.Module, steps: int, loss: Callable[[], Tensor]) -> float:
    """Train a model: the mean loss of the last tenth of the steps."""
    return statistics.fmean(history(build, model, steps, loss)[-steps // 10 :])


@torch.no_grad()
def at_end(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """A loss of a model that was trained."""
    model.eval()
    return float(loss())


def fixed(seed: int = 0) -> torch.Generator:
    """Random numbers that are the same in all runs, for what a task is to find out."""
    return torch.Generator().manual_seed(seed)


def some_digits(n: int) -> tuple[Tensor, Tensor]:
    """Training images of digits as 64 numbers each, and their labels."""
    (x, y), _ = task_data.digits()
    rows = torch.randint(len(x), (n,))
    return x[rows].flatten(1), y[rows]


def all_digits(test: bool = False) -> tuple[Tensor, Tensor]:
    """All training images, or all test images."""
    x, y = task_data.digits()[test]
    return x.flatten(1), y
