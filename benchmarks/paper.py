"""Show the claims of the SINGD paper again: `make paper`.

It draws the figures and tables of docs/paper.md from the runs that are kept in
benchmarks/results/paper/. `make paper ARGS="--run"` first makes the runs that are missing, one file
for each; a run that exists is not made again, so that the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pages import ROOT
from paper_measures import MEASURES, keep
from paper_methods import METHODS
from paper_plan import PRECISION, SEARCHED, Plan
from paper_report import publish, searched
from paper_runs import Store, train
from paper_tasks import LARGE, PAPER_TASKS, add_large


def execute(plan: Plan, deadline: float, device: torch.device) -> None:
    """Make what is missing, in order; what was found decides what is missing next."""
    while time.monotonic() < deadline and (todo := plan.pending()):
        run = todo[0]
        result = train(run, device)
        plan.store.add(run, result)
        said = f"{run.task} {run.method} {run.dtype} seed {run.seed} {run.settings}"
        print(f"{len(plan.store.results)} of {plan.total()}: {said}: {result.final}", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = list(dict.fromkeys([*PRECISION, *SEARCHED]))
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--tasks", nargs="+", choices=[*tasks, LARGE], default=tasks)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--steps", type=int, help="at most so many for each run; needs --results")
    parser.add_argument("--images", type=Path, help="a folder with one folder for each class")
    parser.add_argument(
        "--vit",
        type=int,
        nargs=5,
        default=[12, 384, 6, 224, 16],
        metavar=("LAYERS", "WIDTH", "HEADS", "PIXELS", "PATCH"),
        help="of the vision transformer on --images",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=Store.FOLDER)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "paper.md")
    args = parser.parse_args(given)
    if args.results == Store.FOLDER and (args.steps, args.images) != (None, None):
        parser.error("--steps and --images need --results: their runs are kept apart")
    if args.images is not None:
        add_large(args.images, *args.vit)
        args.tasks = [LARGE]
    elif LARGE in args.tasks:
        parser.error(f"the task {LARGE} needs --images")
    torch.set_num_threads(1)
    for name in args.tasks:
        if missing := PAPER_TASKS[name].missing:
            print(f"{name} is left out: it needs {missing}")
    plan = Plan(Store(args.results), args.tasks, args.methods, args.steps)
    if args.run:
        for name in MEASURES:
            keep(name, args.results)
        execute(plan, time.monotonic() + 60.0 * args.minutes, args.device)
    if args.images is None:
        publish(Plan(plan.store, steps=args.steps), args.page)
    else:
        print(searched(plan, LARGE))


if __name__ == "__main__":
    main()
