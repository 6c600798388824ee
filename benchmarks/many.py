"""Many small tasks of many kinds: SINGD at its defaults beside AdamW at the best of six rates.

Each task is trained at a constant rate and with a linear decay to 0. Seed 0 chooses the rate of
AdamW, and the seeds 2, 3 and 6 are those of the tables. Every run is kept in
benchmarks/results/many/ and is never made twice, so that the command goes on where it stopped; a
change of SINGD's code makes its own runs anew. A task that is changed needs its folder there
deleted.

    python benchmarks/many.py

It writes the tables of docs/many_tasks.md. One thread takes about 40 minutes for all runs, and 20
for those of SINGD.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import many_report
from many_runs import METHODS, SCHEDULES, Plan, Store, made
from many_tasks import TASKS
from pages import ROOT, write
from run_store import trained

PAGE = ROOT / "docs" / "many_tasks.md"


def execute(plan: Plan, workers: int) -> None:
    """Make all that is missing: what chooses the rates, then what follows from them."""
    while todo := plan.pending():
        for n, (run, result) in enumerate(trained(made, todo, workers), 1):
            plan.store.add(run, result)
            print(
                f"{n}/{len(todo)} {run.path}: {result.loss:.4g} in {result.seconds} s", flush=True
            )


def cost(plan: Plan) -> str:
    """How much is missing, as far as can be said before the rates are chosen."""
    todo = plan.pending()
    seconds: dict[tuple[str, str], list[float]] = {}
    for run, result in plan.store:
        seconds.setdefault((run.task, run.method), []).append(result.seconds)
    minutes = sum(statistics.fmean(seconds.get((r.task, r.method), [1.5])) for r in todo) / 60.0
    return f"{len(todo)} runs are missing: about {minutes:.0f} minutes of one core"


def main(given: Sequence[str] | None = None) -> None:
    """Make what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--dry", action="store_true", help="say what is missing and what it takes")
    parser.add_argument("--report-only", action="store_true", help="write the page, run nothing")
    parser.add_argument("--results", type=Path, default=Store.FOLDER)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(given)
    there = [t for t in args.tasks if (needs := TASKS[t].needs) is None or needs.exists()]
    plan = Plan(Store(args.results), there, args.schedules, args.methods)
    print(cost(plan))
    if args.dry:
        return
    if not args.report_only:
        execute(plan, args.workers)
    write(args.page, "python benchmarks/many.py", many_report.markdown(Plan(plan.store)))


if __name__ == "__main__":
    main()
