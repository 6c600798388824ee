"""Race optimizers to a training loss, in seconds: `make race`.

Every training of a task gets the same seconds on one thread, and its rate falls linearly to zero
over them. One seed tunes: each optimizer runs at four rates, and at up to three more beyond an edge
that is best; SINGD as it is runs at its one. The target is the loss that AdamW, at the rate that is
best for it, has after three quarters of its time; the rate of each optimizer is the one that
reaches it first, or else ends lowest. With that rate it runs on three other seeds.

Every curve is kept in benchmarks/results/ as soon as it is there, and a later call goes on where
the last one stopped: `make race ARGS="--minutes 8"`. The table and the picture of
docs/benchmarks.md are made of all curves that are kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import chosen
from curves import ENTRANTS, SEEDS, Curve, Run, load, pending, save
from optimizers import ENTRIES
from pages import RESULTS, ROOT, environment
from race_report import publish
from race_tasks import RACES, Race
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from task_data import Split
from tasks import mean
from torch import nn

CHECKS = 30  # evaluations of the loss over a training, in equal times
EXAMPLES = 512  # at most so many, the same in all evaluations
QUEUED = 8  # steps between two looks at the clock where a device has to be waited for
CPU = torch.device("cpu")


def train(run: Run, seconds: float, device: torch.device = CPU) -> Curve:
    """Train for some seconds; evaluations and the first call of everything take none of them."""
    race, curve = RACES[run.task], Curve(run, environment(device))
    warm_up = Curve(run, curve.environment)
    _take_steps(run, race, 0.0, device, warm_up, lambda model: float("nan"))
    (x, y), (x_test, y_test) = (tuple(a.to(device) for a in split) for split in race.task.data())
    every = -(-len(x) // EXAMPLES)

    def loss(model: nn.Module) -> float:
        model.eval()
        found = mean(race.task.loss, model, x[::every], y[::every])
        model.train()
        return found

    model = _take_steps(run, race, seconds, device, curve, torch.no_grad()(loss))
    model.eval()
    with torch.no_grad():
        curve.metric = mean(race.task.metric, model, x_test, y_test)
    return curve


def _take_steps(
    run: Run,
    race: Race,
    seconds: float,
    device: torch.device,
    curve: Curve,
    loss: Callable[[nn.Module], float],
) -> nn.Module:
    torch.manual_seed(run.seed)
    model = race.task.model().to(device)
    entry = ENTRIES[run.optimizer]
    optimizer = entry.build(model, run.rate, run.T, race.task.loss_average)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = race.task.batches(run.seed, 1_000_000)
    spent, steps = 0.0, 0
    at_once = 1 if device.type == "cpu" else QUEUED
    while True:
        start = time.perf_counter()
        for _ in range(at_once):
            x, y = (part.to(device, non_blocking=True) for part in next(batches))
            _step(race, model, optimizer, (x, y))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent, steps = spent + time.perf_counter() - start, steps + at_once
        if spent * CHECKS >= seconds * (len(curve.losses) + 1):
            curve.add(spent, steps, loss(model))
        if spent >= seconds or curve.diverged:
            return model
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 - spent / seconds)


def _step(race: Race, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Split) -> None:
    x, y = batch
    optimizer.zero_grad()
    race.task.loss(model(x), y).backward()
    optimizer.step()


# ---- many runs ----------------------------------------------------------------------------------


def execute(
    runs: list[Run],
    scale: float,
    workers: int,
    deadline: float,
    keep: Callable[[Curve], None],
    device: torch.device = CPU,
) -> None:
    """Train, each of the workers one run at a time, and start none after the deadline."""
    if workers == 0:
        for run in runs:
            if time.monotonic() < deadline:
                keep(train(run, scale * RACES[run.task].seconds, device))
        return
    context = multiprocessing.get_context("spawn")
    waiting = iter(runs)
    with futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        active: set[futures.Future[Curve]] = set()
        while True:
            while len(active) < workers and time.monotonic() < deadline:
                run = next(waiting, None)
                if run is None:
                    break
                active.add(pool.submit(train, run, scale * RACES[run.task].seconds, device))
            if not active:
                return
            done, active = futures.wait(active, return_when=futures.FIRST_COMPLETED)
            for future in done:
                keep(future.result())


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=RACES, default=list(RACES))
    parser.add_argument(
        "--optimizers", nargs="+", default=["*"], help="names, or patterns: SINGD/*"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--device", type=torch.device, default=CPU, help="cuda: --results too")
    parser.add_argument("--scale", type=float, default=1.0, help="of the seconds of each training")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--no-page", action="store_true", help="only keep the results")
    args = parser.parse_args(given)
    if args.device != CPU and args.results == RESULTS:
        parser.error("--device needs --results: curves of other devices are kept apart")
    if args.scale != 1.0 and args.results == RESULTS:
        parser.error("--scale needs --results: curves of other lengths are kept apart")
    names = {"AdamW", *chosen(args.optimizers, args.device)}  # AdamW sets the target
    entrants = [entrant for entrant in ENTRANTS if entrant[0] in names]
    tasks = [name for name in args.tasks if not RACES[name].missing]
    for name in set(args.tasks) - set(tasks):
        print(f"left out: {RACES[name].missing}")
    deadline = time.monotonic() + 60.0 * args.minutes
    curves = load(args.results)

    def wanted() -> list[Run]:
        return [run for task in tasks for run in pending(curves, task, entrants)]

    columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        per_entrant = len(ENTRIES["AdamW"].rates) + len(SEEDS)
        bar = progress.add_task("runs", total=len(tasks) * len(entrants) * per_entrant)

        def keep(curve: Curve) -> None:
            curves[curve.run] = curve
            save(curve, args.results)
            progress.advance(bar)

        while time.monotonic() < deadline and (todo := wanted()):
            execute(todo, args.scale, args.workers, deadline, keep, args.device)
    if not args.no_page:
        publish(curves, args.page)


if __name__ == "__main__":
    main()
