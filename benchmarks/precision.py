"""Train in float32, under autocast and in pure bfloat16, by every rounding: `make precision`.

Every run is kept in benchmarks/results/precision/ and is made once; `--again` makes those anew that
other code has made. The table goes between the marks in docs/low_precision.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, ROOT, digits, table, write
from run_store import CODE
from tasks import TASKS, Task
from torch import nn

from singd_torch import SINGD

FOLDER = RESULTS / "precision"
PAGE = ROOT / "docs" / "low_precision.md"

CHOSEN = ["digits-mlp", "digits-cnn", "autoencoder"]
STEPS = 100
SEEDS = (1, 2, 3)

METHODS: dict[str, dict[str, Any]] = {
    # one rate for all three, at which it is near the best of `make compare` on each
    "AdamW": {"recipe": "paper", "fallback_lr": 5e-2},
    "KFAC": {"kfac": True},
    "IKFAC": {"structures": "dense"},
    "INGD": {"structures": "dense", "kfac_like": False},
    "SINGD, default": {},
    "SINGD, diagonal": {"structures": "diagonal"},
}
FORMATS = ["float32", "autocast", "nearest", "stochastic", "kahan"]
TITLES = ["float32", "autocast", "bfloat16, nearest", "stochastic", "Kahan"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides a training.

    Attributes:
        task: The task's name.
        method: The optimizer's name.
        format: "float32", "autocast", or how pure bfloat16 is rounded.
        seed: Of the model's start and the batches.
    """

    task: str
    method: str
    format: str
    seed: int

    @property
    def path(self) -> Path:
        """Its file."""
        method = self.method.replace(", ", "-").replace(" ", "-").lower()
        return FOLDER / self.task / f"{method}-{self.format}-{self.seed}.json"


def runs() -> Iterator[Run]:
    """All, so that those that are compared are made one after the other."""
    for seed, task, method in itertools.product(SEEDS, CHOSEN, METHODS):
        for kind in FORMATS:
            yield Run(task, method, kind, seed)


def optimizer(run: Run, model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The optimizer of a run; AdamW is torch's own where nothing is rounded in its own way."""
    given = METHODS[run.method]
    pure = run.format not in ("float32", "autocast")
    how = {"rounding": run.format} if pure else {}
    if run.method != "AdamW":
        return SINGD(model, loss_average=task.loss_average, **given, **how)
    if run.format in ("stochastic", "kahan"):
        return SINGD(model.parameters(), **given, **how)
    return torch.optim.AdamW(model.parameters(), lr=given["fallback_lr"])


def train(run: Run) -> dict[str, Any]:
    """Train and evaluate, in float32, what came of it."""
    task = dataclasses.replace(TASKS[run.task], steps=STEPS)
    torch.manual_seed(run.seed)
    model = task.model()
    pure = run.format not in ("float32", "autocast")
    dtype = torch.bfloat16 if pure else torch.float32
    model.to(dtype)
    chosen = optimizer(run, model, task)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0 - step / STEPS)
    autocast = run.format == "autocast"
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    cpu = time.process_time()
    for x, y in task.batches(run.seed, STEPS):
        chosen.zero_grad()
        with context:
            outputs = model(x.to(dtype))
        loss = task.loss(outputs.float(), y)
        if not math.isfinite(loss.item()):
            return {"loss": None, "metric": None, "steps": STEPS, "code": CODE}
        loss.backward()
        chosen.step()
        schedule.step()
    cpu = time.process_time() - cpu
    loss, metric = task.evaluate(model.float())
    finite = math.isfinite(loss)
    return {
        "loss": loss if finite else None,
        "metric": metric if finite else None,
        "cpu_ms": round(1e3 * cpu / STEPS, 3),
        "steps": STEPS,
        "code": CODE,
        "torch": torch.__version__,
    }


def keep(run: Run, result: dict[str, Any]) -> None:
    """Write a run's file, which is there as a whole or not at all."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    new = run.path.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(run) | result) + "\n")
    new.replace(run.path)


def report() -> str:
    """The table: a task's rows are its methods, its columns the formats."""
    found = {run: json.loads(run.path.read_text()) for run in runs() if run.path.exists()}
    rows = []
    for task, method in itertools.product(CHOSEN, METHODS):
        cells = []
        for kind in FORMATS:
            own = [found[r]["loss"] for s in SEEDS if (r := Run(task, method, kind, s)) in found]
            if not own:
                cells.append("not run")
            elif None in own:
                cells.append(f"{own.count(None)} of {len(own)} diverge")
            else:
                spread = f" ± {digits(statistics.stdev(own))}" if len(own) > 1 else ""
                cells.append(digits(statistics.fmean(own)) + spread)
        rows.append([TASKS[task].title, method, *cells])
    shown = table(["task", "", *TITLES], rows, words=2)
    made = f"{len(found)} of {len(list(runs()))} runs were made"
    return f"{shown}\n\n{made}; `make precision` makes what is missing."


def main() -> None:
    """Make what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="train nothing, write the table")
    parser.add_argument("--again", action="store_true", help="make runs of other code anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for run in [] if given.report else runs():
        found = json.loads(run.path.read_text()) if run.path.exists() else None
        if found is not None and (not given.again or found["code"] == CODE):
            continue
        result = train(run)
        keep(run, result)
        print(run, result["loss"], flush=True)
    write(PAGE, "make precision", report())


if __name__ == "__main__":
    main()
