"""Batches of 512 examples: layers that learn from rows beside layers that learn from gradients.

    OMP_NUM_THREADS=1 python benchmarks/many_examples.py

It trains tasks of the comparison in larger batches, with a linear decay, and writes a table into
docs/rows.md. One core takes about ten minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compare_runs import stepped
from pages import ROOT, digits, table, write
from rich.progress import track
from tasks import TASKS, Task
from torch import nn

from singd_torch import SINGD

EXAMPLES = 512
SEEDS = 2, 3
# Tasks and their steps: first those with a label for each example.
STEPS = {
    "digits-cnn": 60,
    "mnist-cnn": 80,
    "wide-mlp": 60,
    "vit": 60,
    "resnet": 60,
    "autoencoder": 100,
    "vae": 100,
    "unet": 60,
    "lstm": 60,
    "transformer": 30,
}
WAYS: dict[str, Callable[[nn.Module, str], Any]] = {
    "`SINGD(model)`": lambda model, mean: SINGD(model, loss_average=mean),
    "`rows=inf`": lambda model, mean: SINGD(model, rows=math.inf, loss_average=mean),
    "without the model": lambda model, mean: SINGD(model.named_parameters()),
}


def trained(task: Task, build: Callable[[nn.Module, str], Any], seed: int) -> tuple[float, float]:
    """The training loss and the test metric after training with a linear decay."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = build(model, task.loss_average)
    stepped(task, model, optimizer, lambda step: 1.0 - step / task.steps, seed, task.steps)
    loss, metric = task.evaluate(model)
    return loss, metric


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--quick", action="store_true", help="two steps; nothing is written")
    args = parser.parse_args(given)
    rows = []
    for name in track(args.tasks):
        steps = 2 if args.quick else STEPS[name]
        task = dataclasses.replace(TASKS[name], batch=EXAMPLES, steps=steps)
        cells = [name, str(steps)]
        for build in WAYS.values():
            found = [trained(task, build, seed) for seed in SEEDS[: 1 if args.quick else None]]
            loss, metric = (statistics.fmean(values) for values in zip(*found, strict=True))
            cells.append(f"{digits(loss)} ({digits(metric)})")
        rows.append(cells)
    text = table(["task", "steps", *WAYS], rows)
    print(text)
    if not args.quick:
        write(ROOT / "docs" / "rows.md", "python benchmarks/many_examples.py", text)


if __name__ == "__main__":
    main()
