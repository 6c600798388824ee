"""Measure the training steps of several optimizers side by side: `make bench`.

All optimizers of a network take their steps in turns in one process, so that noise hits all alike;
every time is a median. Results are kept in benchmarks/results/, one file for each device and
network, so that a run of some networks and optimizers replaces what it measured:

    make bench ARGS="--models mlp gpt --optimizers 'SINGD/*' AdamW"

The tables and the picture of docs/benchmarks.md are made of all results that are kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Anatomy, Trainee, anatomy, seconds
from optimizers import ENTRIES, Entry
from pages import RESULTS, ROOT, environment
from problems import PROBLEMS, SMALL, Problem
from rich.console import Console
from rich.progress import Progress
from steps import Kind, Row, load, save
from steps_report import publish

WARM_UP = 2  # steps of each that count only where there are no others of their kind
RATE = 3e-3  # of all: the cost of a step does not depend on it


def trainee(problem: Problem, entry: Entry, T: int, device: torch.device) -> Trainee:
    """A network with an optimizer and a batch, the same for all optimizers."""
    torch.manual_seed(0)
    model = problem.model().to(device)
    x, y = (part.to(device) for part in problem.batch())
    optimizer = entry.build(model, RATE, T, problem.loss_average)
    return Trainee(model, optimizer, problem.loss, x, y)


class Runner:
    """One optimizer of a network with one T, and the times of its steps."""

    def __init__(
        self, problem: Problem, name: str, T: int, device: torch.device, limit: float
    ) -> None:
        self.name, self.entry, self.T = name, ENTRIES[name], T
        self._problem, self._device, self._limit = problem, device, limit
        self.samples: list[tuple[float, float]] = []
        self.trainee: Trainee | None = None

    def kinds(self, steps: int) -> list[bool]:
        """Which of the first steps refresh."""
        return [self.entry.is_refresh(step, self.T) for step in range(steps)]

    def _saw_all(self, steps: int) -> bool:
        return len(set(self.kinds(steps))) == len(set(self.kinds(self.T)))

    def anatomy(self) -> Anatomy:
        """The calls and bytes of one period and two steps more, or of what fits."""

        def enough(steps: int, spent: float) -> bool:
            return steps > self.T + 1 or (spent > self._limit and self._saw_all(steps))

        return anatomy(self._build, enough, self._device)

    def _build(self) -> Trainee:
        return trainee(self._problem, self.entry, self.T, self._device)

    def step(self) -> None:
        """Take one timed step, unless the time is used up."""
        if self.trainee is None:
            self.trainee = self._build()
        spent = sum(map(sum, self.samples))
        if spent <= self._limit or not self._saw_all(len(self.samples)):
            self.samples.append(seconds(self.trainee, self._device))
            self.trainee.optimizer.zero_grad()  # only one model at a time has gradients

    def kind(self, refresh: bool, calls: list[tuple[int, int]], plain: int) -> Kind | None:
        """The medians of the steps that refresh, or of the others; None if there are none."""

        def of_kind(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
            mine = [i for i, k in enumerate(self.kinds(len(values))) if k == refresh]
            return [values[i] for i in [i for i in mine if i >= WARM_UP] or mine]

        times = of_kind(self.samples)
        if not times:
            return None
        return Kind(
            taken=len(times),
            forward_backward=statistics.median(outside for outside, _ in times),
            step=statistics.median(inside for _, inside in times),
            whole=statistics.median(map(sum, times)),
            calls=round(statistics.median(map(sum, of_kind(calls)))) - plain,
        )


def measure(
    problem: str,
    names: list[str],
    steps: int,
    device: torch.device,
    limit: float,
    report: Callable[[str], None],
) -> list[Row]:
    """All rows of a network."""
    made = [
        Runner(PROBLEMS[problem], name, T, device, limit)
        for name in names
        for T in ENTRIES[name].measured or ENTRIES[name].periods
    ]
    base = next(runner for runner in made if runner.name == "SGD")
    if device.type == "cuda":
        base.anatomy()  # allocates the workspaces of cuBLAS, which stay
    anatomies = []
    for runner in made:
        report(f"{problem}: memory of {runner.name}, T = {runner.T}")
        anatomies.append(runner.anatomy())
    order = random.Random(0)
    for i in range(WARM_UP + steps):
        report(f"{problem}: step {i + 1} of all")
        gc.collect()
        gc.disable()
        for runner in order.sample(made, len(made)):
            runner.step()
        gc.enable()
    plain = round(statistics.median(outside for outside, _ in anatomies[made.index(base)].calls))
    sgd = base.kind(False, anatomies[made.index(base)].calls, plain)
    assert sgd is not None
    return [
        Row(
            problem=problem,
            optimizer=runner.name,
            T=runner.T,
            refresh=runner.kind(True, found.calls, plain),
            other=runner.kind(False, found.calls, plain),
            state=found.state,
            peak=found.peak,
            sgd=sgd,
            environment=environment(device),
        )
        for runner, found in zip(made, anatomies, strict=True)
    ]


def chosen(patterns: list[str], device: torch.device) -> list[str]:
    """The optimizers for a device that a pattern names and that are installed, and always SGD."""
    found = [
        name
        for name, entry in ENTRIES.items()
        if name in ("SGD", *patterns)
        or (device.type in entry.devices and any(fnmatch.fnmatchcase(name, p) for p in patterns))
    ]
    for pattern in patterns:
        if not fnmatch.filter(ENTRIES, pattern):
            raise SystemExit(f"no optimizer is called {pattern!r}; there are {', '.join(ENTRIES)}")
    for name in found:
        if not ENTRIES[name].available:
            print(f"left out: {name}, which needs pip install '.[{ENTRIES[name].extra}]'")
    return [name for name in found if ENTRIES[name].available]


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(SMALL))
    parser.add_argument(
        "--optimizers", nargs="+", default=["*"], help="names, or patterns: SINGD/*"
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each optimizer")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for each optimizer")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="two steps; prints, keeps nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--report", action="store_true", help="only write the page anew")
    parser.add_argument("--no-page", action="store_true", help="only keep the results")
    args = parser.parse_args(given)
    names = chosen(args.optimizers, args.device)
    if args.device.type == "cpu":
        torch.set_num_threads(1)
    console = Console(stderr=True)
    for problem in [] if args.report else args.models:
        start = time.perf_counter()
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task(problem, total=None)
            rows = measure(
                problem,
                names,
                2 if args.quick else args.steps,
                args.device,
                1.0 if args.quick else args.limit,
                lambda text, bar=bar: progress.update(bar, description=text),
            )
        console.print(f"{problem}: {time.perf_counter() - start:.0f} s")
        for row in rows if args.quick else []:
            print(row.brief())
        if not args.quick:
            save(rows, args.results)
    if not args.quick and not args.no_page:
        publish(load(args.results), args.page)


if __name__ == "__main__":
    main()
