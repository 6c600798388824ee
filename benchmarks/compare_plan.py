"""Which runs `make compare` needs: a search of each rival's rates, then the seeds that confirm.

A rival is searched with seed 0 at six rates, on every task and schedule. If the best of them is at
the edge, one more rate is tried on that side, at most four times. Its best rate for the task, and
the one rate that is best for it over the twelve tasks, are then run with the seeds that confirm.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compare_runs import BESIDES, LINEAR, OWN, RIVALS, Run, Store, make
from tasks import TWELVE

SEARCH = 0  # the seed that chooses the rates of rivals
CHOICE = (0, 1)  # the seeds that choose settings of SINGD
CONFIRM = (2, 3, 4)  # the seeds of the tables, which chose nothing
EXTENSIONS = 4
RATES: dict[str, tuple[float, ...]] = {
    "AdamW": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    "Muon": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "SOAP": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    "PSGD": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02),
    "Adafactor": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
}


def neighbour(rate: float, up: bool) -> float:
    """The next rate in 1, 2, 5, 10, ..."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    ladder = [float(f"{m}e{e}") for e in range(exponent - 1, exponent + 2) for m in (1, 2, 5)]
    here = min(range(len(ladder)), key=lambda i: abs(math.log(ladder[i] / rate)))
    return ladder[here + (1 if up else -1)]


def known(losses: Iterable[float | None]) -> list[float] | None:
    """The losses, once all of them are there."""
    found = list(losses)
    there = [loss for loss in found if loss is not None]
    return there if len(there) == len(found) else None


def lowest(rates: Sequence[float], loss: Callable[[float], float | None]) -> float | None:
    """The rate with the lowest loss, once all were tried."""
    losses = known(map(loss, rates))
    return None if losses is None else rates[losses.index(min(losses))]


def widened(rates: Sequence[float], loss: Callable[[float], float | None]) -> list[float]:
    """The rates, and those that are still to be tried since the best was at the edge."""
    rates = sorted(rates)
    for _ in range(EXTENSIONS):
        best = lowest(rates, loss)
        if best is None or loss(best) == math.inf or best not in (rates[0], rates[-1]):
            break
        rates = sorted([*rates, neighbour(best, up=best == rates[-1])])
    return rates


def behind(loss: float, other: float) -> float:
    """The logarithm of a ratio of losses, at most 1 in size."""
    if math.inf in (loss, other):
        return float(loss > other) - float(loss < other)
    return max(-1.0, min(1.0, math.log(max(loss, 1e-30) / max(other, 1e-30))))


@dataclasses.dataclass
class Plan:
    """What is wanted, and what of it is known from the runs that were made.

    Attributes:
        store: The runs that were made.
        tasks: To run.
        methods: To run.
        schedules: To run.
        seeds: To confirm with.
        variants: Settings of SINGD; the default is {}.
        basis: The tasks over which a rival's one rate is the best; of the twelve, those whose data
            or runs are there, if none are named.
        steps: At most so many for each run; None for the task's own.
    """

    store: Store
    tasks: Sequence[str]
    methods: Sequence[str] = (*OWN, *RIVALS, *BESIDES)
    schedules: Sequence[str] = ("linear",)
    seeds: Sequence[int] = CONFIRM
    variants: Sequence[dict[str, Any]] = ({},)
    basis: Sequence[str] = ()
    steps: int | None = None

    def __post_init__(self) -> None:
        kept = {run.task for run, _ in self.store}
        there = (name for name, task in TWELVE.items() if name in kept or task.missing is None)
        self.basis = self.basis or list(there)

    def run(
        self, task: str, method: str, rate: float | None, seed: int, schedule: str, **given: Any
    ) -> Run:
        """A run, shortened where that is wanted."""
        found = make(task, method, rate, seed, schedule, **given)
        steps = found.steps if self.steps is None else min(self.steps, found.steps)
        return dataclasses.replace(found, steps=steps)

    # ---- rates ----------------------------------------------------------------------------------

    def searched(self, task: str, method: str, rate: float, schedule: str) -> float | None:
        """The loss of the search at a rate, if it was made."""
        return self.store.loss(self.run(task, method, rate, SEARCH, schedule))

    def common(self, method: str, schedule: str) -> list[float]:
        """The rates that are tried on every task."""
        rates = sorted(RATES[method])
        for _ in range(EXTENSIONS):
            best = self._least_regret(method, schedule, rates)
            if best not in (rates[0], rates[-1]):  # within, or not known yet
                break
            rates = sorted([*rates, neighbour(best, up=best == rates[-1])])
        return rates

    def grid(self, task: str, method: str, schedule: str) -> list[float]:
        """The rates that are tried on a task."""
        common = self.common(method, schedule)
        return widened(common, lambda rate: self.searched(task, method, rate, schedule))

    def best(self, task: str, method: str, schedule: str) -> float | None:
        """The rate with the lowest loss, once all were tried."""
        rates = self.grid(task, method, schedule)
        return lowest(rates, lambda rate: self.searched(task, method, rate, schedule))

    def regret(
        self, method: str, rate: float, schedule: str, rates: Sequence[float]
    ) -> float | None:
        """How far a rate is from the best of some for each task: a mean of logarithms.

        A loss of more than e times the best counts as e times, so that no task decides alone; one
        that went astray is never made good.
        """
        ratios = []
        for task in self.basis:
            losses = known(self.searched(task, method, r, schedule) for r in rates)
            mine = self.searched(task, method, rate, schedule)
            if mine is None or losses is None:
                return None
            ratios.append(mine if mine == math.inf else behind(mine, min(losses)))
        return statistics.fmean(ratios)

    def one(self, method: str, schedule: str) -> float | None:
        """The rate that is best over all tasks, once all were tried."""
        return self._least_regret(method, schedule, self.common(method, schedule))

    def _least_regret(self, method: str, schedule: str, rates: Sequence[float]) -> float | None:
        return lowest(rates, lambda rate: self.regret(method, rate, schedule, rates))

    # ---- runs -----------------------------------------------------------------------------------

    def search(self) -> list[Run]:
        """The runs of seed 0 that the rates of rivals are chosen by."""
        return [
            self.run(task, method, rate, SEARCH, schedule)
            for schedule in self.schedules
            for task in self.tasks
            for method in self._methods(schedule)
            if method not in OWN
            for rate in self.grid(task, method, schedule)
        ]

    def confirmation(self, guess: bool = False) -> list[Run]:
        """The seeds of SINGD and of the rates that were chosen, or of a guess at them."""
        found = []
        for schedule in self.schedules:
            for method in self._methods(schedule):
                one = None if method in OWN else self.one(method, schedule)
                for task in self.tasks:
                    if method in OWN:
                        found += [
                            self.run(task, method, None, seed, schedule, **given)
                            for given in self.variants
                            for seed in self.seeds
                        ]
                        continue
                    guesses = RATES[method][2:4] if guess else (None, None)
                    rates = {one or guesses[0], self.best(task, method, schedule) or guesses[1]}
                    found += [
                        self.run(task, method, rate, seed, schedule)
                        for rate in sorted(rate for rate in rates if rate is not None)
                        for seed in self.seeds
                    ]
        return found

    def _methods(self, schedule: str) -> list[str]:
        return [m for m in self.methods if schedule == "linear" or m not in LINEAR]

    def pending(self, guess: bool = False) -> list[Run]:
        """What is missing: first all that chooses, then what confirms."""
        wanted = dict.fromkeys([*self.search(), *self.confirmation(guess)])
        return [run for run in wanted if not self.store.is_made(run)]

    def seconds(self, runs: Sequence[Run]) -> float:
        """What runs will take, as runs of the same task and method took that were made."""
        known: dict[tuple[str, str], list[float]] = {}
        for run, result in self.store:
            for key in ((run.task, run.method), (run.task, ""), ("", run.method), ("", "")):
                known.setdefault(key, []).append(result.seconds)
        total = 0.0
        for run in runs:
            keys = ((run.task, run.method), (run.task, ""), ("", run.method), ("", ""))
            total += next((statistics.fmean(known[k]) for k in keys if k in known), 5.0)
        return total
