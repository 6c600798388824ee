"""Compare SINGD at its one default rate with AdamW, Muon and SOAP at their best: `make compare`.

Every run is kept in benchmarks/results/compare/ and is never made twice, so that the command goes
on where it stopped; a change of SINGD's code makes its own runs anew. The tables go between the
marks in docs/comparison.md and docs/rows.md.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compare_picture
import compare_report
from compare_plan import CHOICE, CONFIRM, Plan
from compare_runs import (
    BESIDES,
    OURS,
    OWN,
    RIVALS,
    SCHEDULES,
    Run,
    Store,
    train,
)
from compare_tried import against_rivals
from pages import ROOT, save_svg, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from run_store import trained
from tasks import BATCHES, HELD_OUT, SCALES, SHORT, TASKS, TWELVE

PAGE = ROOT / "docs" / "comparison.md"
ROWS = ROOT / "docs" / "rows.md"
PICTURE = ROOT / "docs" / "comparison.svg"
GROUPS = {
    "twelve": list(TWELVE),
    "batches": list(BATCHES),
    "short": list(SHORT),
    "held-out": list(HELD_OUT),
    "scales": list(SCALES),
}
QUICK_TASKS = ["digits-mlp", "digits-cnn", "autoencoder", "vit"]
QUICK_STEPS = 30


def settings(text: str) -> dict[str, Any]:
    """What `--singd` names: "lr=0.05,structures=('dense', 'diagonal')" and the like."""
    found = {}
    for part in re.split(r",(?=\w+=)", text):
        name, _, value = part.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


# ---- runs ---------------------------------------------------------------------------------------


def execute(plan: Plan, workers: int, report: Callable[[int, int], None]) -> None:
    """Make all that is missing; what was found decides what is missing next."""
    made: set[Run] = set()
    while todo := [run for run in plan.pending() if run not in made]:
        total = len(made) + len(todo)
        report(len(made), total)
        for run, result in trained(train, todo, workers):
            plan.store.add(run, result)
            made.add(run)
            report(len(made), total)


def cost(plan: Plan) -> str:
    """How much is missing, as far as can be said before the searches are complete."""
    todo = plan.pending(guess=True)
    minutes = plan.seconds(todo) / 60.0
    return f"{len(todo)} runs are missing: about {minutes:.0f} minutes of one core"


# ---- the command --------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What the command was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=[*GROUPS, *TASKS], default=list(GROUPS))
    parser.add_argument("--methods", nargs="+", choices=[*OWN, *RIVALS, *BESIDES])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument(
        "--seeds", nargs="*", type=int, help="that confirm, or run --singd; none: search alone"
    )
    parser.add_argument(
        "--singd", action="append", type=settings, metavar="KEY=VALUE,...", help="try settings"
    )
    parser.add_argument("--quick", action="store_true", help="minutes; its runs are not kept")
    parser.add_argument("--dry", action="store_true", help="say what is missing and what it costs")
    parser.add_argument("--report-only", action="store_true", help="write the page, run nothing")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--results", type=Path, default=Store.FOLDER)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(given)
    if args.seeds is None:
        args.seeds = CHOICE if args.singd else CONFIRM
    args.methods = args.methods or ([OURS] if args.singd else [*OWN, *RIVALS, *BESIDES])
    tasks = dict.fromkeys(task for name in args.tasks for task in GROUPS.get(name, [name]))
    for name in tasks:
        if missing := TASKS[name].missing:
            print(f"{name} is left out: it needs {missing}")
    args.tasks = [name for name in tasks if TASKS[name].missing is None]
    return args


def quickened(args: argparse.Namespace, folder: str) -> Plan:
    """A few tasks for a few steps with one seed."""
    tasks = QUICK_TASKS if set(args.tasks) >= set(TWELVE) else args.tasks
    return Plan(
        Store(Path(folder)),
        tasks,
        args.methods,
        args.schedules[:1],
        args.seeds[:1],
        args.singd or [{}],
        basis=tasks,
        steps=QUICK_STEPS,
    )


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    args = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            plan = quickened(args, folder)
        else:
            variants = args.singd or [{}]
            store = Store(args.results)
            plan = Plan(store, args.tasks, args.methods, args.schedules, args.seeds, variants)
        print(cost(plan))
        if args.dry:
            return
        if not args.report_only:
            columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
                bar = progress.add_task("training", total=None)
                execute(
                    plan, args.workers, lambda n, of: progress.update(bar, completed=n, total=of)
                )
        if args.quick:
            print(compare_report.quick(plan))
        else:
            if args.singd:
                print(against_rivals(plan))
            seeds = args.seeds if set(args.seeds) >= set(CONFIRM) else CONFIRM
            write(args.page, "make compare", compare_report.markdown(plan.store, seeds))
            if args.page == PAGE:
                write(ROOT / "README.md", "make compare", compare_report.brief(plan.store, seeds))
                write(ROWS, "make compare", compare_report.without_rows(plan.store, seeds))
                save_svg(compare_picture.draw(plan.store, seeds), PICTURE)


if __name__ == "__main__":
    main()
