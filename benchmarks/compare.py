"""Train five small networks with AdamW, SGD, Muon and SINGD: `make compare`.

SINGD runs with its default recipe, at its one default rate. The others run at four rates each, and
the best one counts: that of the lowest final training loss, averaged over the seeds. Every run
takes equally many steps, with a linear decay of the rate to zero. The table goes to standard output
and between the marks in docs/comparison.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from optimizers import Muon
from pages import ROOT, table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from tasks import SHAKESPEARE, TASKS, Task
from torch import nn

from singd_torch import SINGD

PAGE = ROOT / "docs" / "comparison.md"
RATES = {
    "AdamW": (0.001, 0.003, 0.01, 0.03),
    "SGD, momentum 0.9": (0.03, 0.1, 0.3, 1.0),
    "Muon": (0.01, 0.03, 0.1, 0.3),
}
STRUCTURES = (
    *("default", "dense", "diagonal"),
    *("blockdiagonal:32", "hierarchical:16,16", "triltoeplitz"),
)


# ---- optimizers ---------------------------------------------------------------------------------


def optimizer(run: Run, model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    if run.rate is None:
        both = None if run.structure == "default" else (run.structure, run.structure)
        return SINGD(model, structures=both, loss_average=task.loss_average)
    if run.method == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=run.rate)
    if run.method == "Muon":
        return Muon(model, run.rate)
    return torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9)


# ---- runs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; SINGD has a structure in place of a rate."""

    task: str
    method: str
    rate: float | None
    structure: str
    seed: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Result:
    """The final training loss, the test metric and the seconds of a step."""

    loss: float
    metric: float
    seconds: float


def train(run: Run) -> Result:
    """Train and evaluate."""
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.model()
    chosen = optimizer(run, model, task)
    decay = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0 - step / run.steps)
    batches = list(task.batches(run.seed, run.steps))
    start = time.perf_counter()
    for x, y in batches:
        chosen.zero_grad()
        task.loss(model(x), y).backward()
        chosen.step()
        decay.step()
    seconds = (time.perf_counter() - start) / run.steps
    return Result(*task.evaluate(model), seconds)


def _one_thread(run: Run) -> tuple[Run, Result]:
    torch.set_num_threads(1)
    return run, train(run)


def runs(tasks: Iterable[str], seeds: int, quick: bool) -> list[Run]:
    """Everything the table needs, the slow tasks first."""
    found = []
    for name in sorted(tasks, key=lambda name: list(TASKS).index(name), reverse=True):
        steps = 10 if quick else TASKS[name].steps
        for seed in range(seeds):
            for structure in STRUCTURES:
                found.append(Run(name, f"SINGD, {structure}", None, structure, seed, steps))
            for method, rates in RATES.items():
                found += [Run(name, method, rate, "", seed, steps) for rate in rates]
    return found


def execute(todo: list[Run], workers: int, report: Callable[[], None]) -> dict[Run, Result]:
    """All results, from processes of one thread each."""
    results = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        for run, result in pool.imap_unordered(_one_thread, todo):
            results[run] = result
            report()
    return results


# ---- the table ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """The seeds of one method at one rate."""

    method: str
    rate: float | None
    results: list[Result]

    @property
    def loss(self) -> float:
        mean = statistics.fmean(r.loss for r in self.results)
        return mean if mean == mean else float("inf")

    def cells(self, ahead: bool) -> list[str]:
        losses = [r.loss for r in self.results]
        rate = "default" if self.rate is None else f"{self.rate:g} of {len(RATES[self.method])}"
        loss, metric = f"{self.loss:.3g}", statistics.fmean(r.metric for r in self.results)
        spread = f"{min(losses):.3g} to {max(losses):.3g}"
        seconds = statistics.median(r.seconds for r in self.results)
        loss = f"**{loss}**" if ahead else loss
        return [self.method, rate, loss, spread, f"{metric:.4f}", f"{1e3 * seconds:.1f}"]


def best_rows(results: dict[Run, Result], task: str) -> list[Row]:
    """Each method at its best rate."""
    grouped: dict[tuple[str, float | None], list[Result]] = defaultdict(list)
    for run, result in sorted(results.items(), key=lambda item: item[0].seed):
        if run.task == task:
            grouped[run.method, run.rate].append(result)
    rows = [Row(*key, found) for key, found in grouped.items()]
    methods = [*(f"SINGD, {s}" for s in STRUCTURES), *RATES]
    return [min((r for r in rows if r.method == m), key=lambda r: r.loss) for m in methods]


def markdown(results: dict[Run, Result], command: str) -> str:
    """The tables of all tasks."""
    lines = []
    for name in TASKS:
        mine = [run for run in results if run.task == name]
        if not mine:
            continue
        task, seeds = TASKS[name], len({run.seed for run in mine})
        lines += [f"**{task.title}**, {mine[0].steps} steps of {task.batch} examples:", ""]
        header = ["optimizer", "rate", "training loss", f"of {seeds} seeds"]
        header += [f"test {task.metric_name}", "ms a step"]
        rows = best_rows(results, name)
        adamw = next(row for row in rows if row.method == "AdamW").loss
        # bold: SINGD at or below AdamW
        cells = (r.cells(r.rate is None and r.loss <= adamw) for r in rows)
        lines += [table(header, cells, words=2), ""]
    text = "Shakespeare" if SHAKESPEARE.exists() else "Python's help topics"
    lines.append(
        f"Made by `{command}` on {platform.machine()} with torch {torch.__version__}, one thread "
        f"a run; the transformer read {text}. Bold: at or below AdamW at its best rate."
    )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="ten steps each: does it run?")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 2))
    args = parser.parse_args()

    todo = runs(args.tasks, args.seeds, args.quick)
    columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=len(todo))
        results = execute(todo, args.workers, lambda: progress.advance(bar))
    whole = set(args.tasks) == set(TASKS) and args.seeds == 3 and not args.quick
    text = markdown(results, "make compare")
    print(text)
    if whole:
        write(PAGE, "make compare", text)


if __name__ == "__main__":
    main()
