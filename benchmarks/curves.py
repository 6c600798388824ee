"""The runs of a race, their curves, and which to run next."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from optimizers import ENTRIES
from race_tasks import RACES

# optimizer and T
Entrant = tuple[str, int]

TUNING = 0  # the seed that chooses the rates
SEEDS = (1, 2, 3)
AHEAD = 0.75  # of AdamW's time, after which it sets the target
FURTHER = 3  # rates at most, beyond a grid whose best is at its edge
ENTRANTS: tuple[Entrant, ...] = (
    *(("SGD", 1), ("AdamW", 1), ("Muon", 1)),
    *((name, T) for name in ("SINGD/default",) for T in ENTRIES[name].periods),
    *(("singd-0.0.5/dense", 10), ("singd-0.0.5/diagonal", 10)),
    *(("SOAP/heavyball", 10), ("SOAP/pytorch-optimizer", 10)),
    *(("PSGD/heavyball", 10), ("PSGD/pytorch-optimizer", 10)),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    optimizer: str
    T: int
    rate: float
    seed: int


@dataclasses.dataclass
class Curve:
    """The training loss over seconds and steps; `metric` is of the test data at the end."""

    run: Run
    environment: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    metric: float = math.nan

    def add(self, seconds: float, steps: int, loss: float) -> None:
        """Add a point."""
        self.seconds.append(seconds)
        self.steps.append(steps)
        self.losses.append(loss if math.isfinite(loss) else math.inf)

    @property
    def diverged(self) -> bool:
        """Whether the last loss is infinite."""
        return bool(self.losses) and math.isinf(self.losses[-1])

    def first(self, target: float) -> int | None:
        """The index of the first point at or below the target."""
        return next((i for i, loss in enumerate(self.losses) if loss <= target), None)

    def arrival(self, target: float) -> float:
        """The seconds to the target, or infinity."""
        index = self.first(target)
        return math.inf if index is None else self.seconds[index]


Curves = dict[Run, Curve]


def tuning(curves: Curves, task: str, entrant: Entrant) -> list[Run]:
    """The runs that choose a rate, by growing rates: a grid, and beyond it if its edge is best."""
    name, T = entrant
    rates = list(ENTRIES[name].rates)
    for _ in range(FURTHER if len(rates) > 1 else 0):
        tuned = _all(curves, [Run(task, name, T, rate, TUNING) for rate in rates])
        if tuned is None:
            break
        goal = _goal(tuned) if name == "AdamW" else target(curves, task)
        at = tuned.index(_first(tuned, goal)) if goal is not None else None
        if at == 0:
            rates.insert(0, _rounded(rates[1] / 10.0))
        elif at == len(rates) - 1:
            rates.append(_rounded(10.0 * rates[-2]))
        else:
            break
    return [Run(task, name, T, rate, TUNING) for rate in rates]


def target(curves: Curves, task: str) -> float | None:
    """The loss to reach, or None before AdamW is tuned."""
    adamw = _all(curves, tuning(curves, task, ("AdamW", 1)))
    return None if adamw is None else _goal(adamw)


def best(curves: Curves, task: str, entrant: Entrant) -> float | None:
    """The rate that reaches the target first, or else ends lowest; None before the tuning."""
    goal, tuned = target(curves, task), _all(curves, tuning(curves, task, entrant))
    return None if goal is None or tuned is None else _first(tuned, goal).run.rate


def _all(curves: Curves, runs: Sequence[Run]) -> list[Curve] | None:
    """The curves of these runs, None if some are missing."""
    found = [curves[run] for run in runs if run in curves]
    return found if len(found) == len(runs) else None


def _goal(adamw: Sequence[Curve]) -> float:
    sound = [curve.losses for curve in adamw if not curve.diverged]
    return min(losses[int(AHEAD * len(losses)) - 1] for losses in sound)


def _first(tuned: Sequence[Curve], goal: float) -> Curve:
    return min(tuned, key=lambda curve: (curve.arrival(goal), curve.losses[-1]))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def final(curves: Curves, task: str, entrant: Entrant) -> list[Run]:
    """The runs that count, once the rate is known."""
    rate = best(curves, task, entrant)
    return [] if rate is None else [Run(task, *entrant, rate, seed) for seed in SEEDS]


def pending(curves: Curves, task: str, entrants: Iterable[Entrant]) -> list[Run]:
    """What can run now: the tuning, then the runs that count."""
    entrants = list(entrants)
    for stage in (tuning, final):
        each = (stage(curves, task, entrant) for entrant in entrants)
        runs = [run for own in each for run in own if run not in curves]
        if runs:
            return runs
    return []


def save(curve: Curve, folder: Path) -> None:
    """Keep a curve with the others of its task."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"race-{curve.run.task}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    kept.append(dataclasses.asdict(curve))
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in kept) + "\n]\n")


def load(folder: Path) -> Curves:
    """All curves that are kept."""
    curves = [
        Curve(**entry | {"run": Run(**entry["run"])})
        for task in RACES
        if (path := folder / f"race-{task}.json").exists()
        for entry in json.loads(path.read_text())
    ]
    return {curve.run: curve for curve in curves}
