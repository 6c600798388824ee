"""The runs of `many.py`: what decides one, which are wanted, and what is kept of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import run_store
from compare_plan import lowest
from compare_runs import OF_MODEL, OURS
from many_tasks import TASKS, train
from noisy import adamw, built
from pages import RESULTS
from run_store import CODE, key_of, versions

from singd_torch import SINGD

RIVAL = "AdamW"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
METHODS: dict[str, dict[str, Any]] = {
    RIVAL: {"kind": adamw, "weight_decay": 0.0},  # as SINGD has
    OURS: {"kind": SINGD},
    OF_MODEL: {"kind": SINGD, "structures": "diagonal"},
}
SCHEDULES = {"constant": False, "linear": True}  # whether the rate decays
SEARCH = 0  # the seed that chooses a rate
CONFIRM = (2, 3, 6)  # the seeds of the tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What decides a training.

    Attributes:
        task: The task's name.
        method: The optimizer's name.
        rate: The rate of AdamW; None for SINGD, which has its own.
        seed: Of the model's start and of all that is drawn.
        schedule: How the rate goes on.
        steps: Of training.
    """

    task: str
    method: str
    rate: float | None
    seed: int
    schedule: str
    steps: int

    @property
    def path(self) -> str:
        """The name of its file: the same for all that is the same."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        method = self.method.replace(",", "").replace(" ", "_")
        key = key_of(dataclasses.asdict(self))
        return f"{self.task}/{method}-{self.schedule}{rate}-seed{self.seed}-{key}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a training ended with.

    Attributes:
        loss: The task's number, of which less is better; infinite where the run went astray.
        seconds: The whole run.
        code: The fingerprint of SINGD's code that made it; empty for AdamW.
        versions: Of the packages and the machine.
    """

    loss: float
    seconds: float
    code: str
    versions: dict[str, str]


def made(run: Run) -> Result:
    """Train."""
    start = time.perf_counter()
    given = METHODS[run.method] | ({} if run.rate is None else {"lr": run.rate})
    build = functools.partial(built, decay=SCHEDULES[run.schedule], **given)
    return Result(
        loss=train(run.task, build, run.seed, run.steps),
        seconds=round(time.perf_counter() - start, 2),
        code="" if run.method == RIVAL else CODE,
        versions=versions(run.method),
    )


class Store(run_store.Store[Run, Result]):
    """All runs that were made."""

    FOLDER = RESULTS / "many"

    def is_made(self, run: Run) -> bool:
        """Whether a run is kept that the present code would make again."""
        found = self.get(run)
        return found is not None and (run.method == RIVAL or found.code == CODE)

    def write(self, run: Run, result: Result) -> dict[str, Any]:
        """A run as JSON: null where it went astray."""
        data = dataclasses.asdict(run) | dataclasses.asdict(result)
        data["loss"] = float(f"{result.loss:.6g}") if math.isfinite(result.loss) else None
        return data

    def read(self, data: dict[str, Any]) -> tuple[Run, Result]:
        """The inverse of `write`."""
        run = {field.name: data.pop(field.name) for field in dataclasses.fields(Run)}
        data["loss"] = math.inf if data["loss"] is None else data["loss"]
        return Run(**run), Result(**data)


@dataclasses.dataclass
class Plan:
    """What is wanted, and what of it is known from the runs that were made.

    Attributes:
        store: The runs that were made.
        tasks: To run.
        schedules: To run.
        methods: To run.
    """

    store: Store
    tasks: Sequence[str] = tuple(TASKS)
    schedules: Sequence[str] = tuple(SCHEDULES)
    methods: Sequence[str] = tuple(METHODS)

    def runs(
        self, task: str, method: str, rate: float | None, seeds: Iterable[int], schedule: str
    ) -> list[Run]:
        """The runs of some seeds."""
        given: dict[str, Any] = {"task": task, "method": method, "rate": rate}
        given |= {"schedule": schedule, "steps": TASKS[task].steps}
        return [Run(**given, seed=seed) for seed in seeds]

    def rate(self, task: str, schedule: str) -> float | None:
        """The rate of AdamW with the lowest loss, once all were tried."""

        def loss(rate: float) -> float | None:
            (run,) = self.runs(task, RIVAL, rate, [SEARCH], schedule)
            return self.store.loss(run)

        return lowest(RATES, loss)

    def confirming(self, task: str, method: str, schedule: str) -> list[Run]:
        """The runs of the tables; none of AdamW before its rate is known."""
        rate = self.rate(task, schedule) if method == RIVAL else None
        if method == RIVAL and rate is None:
            return []
        return self.runs(task, method, rate, CONFIRM, schedule)

    def results(self, task: str, method: str, schedule: str) -> list[Result]:
        """What is known of the runs of the tables."""
        found = map(self.store.get, self.confirming(task, method, schedule))
        return [result for result in found if result is not None]

    def pending(self) -> list[Run]:
        """What is missing, as far as it is known: of a task, first what chooses a rate."""
        wanted = []
        for task in self.tasks:
            for schedule in self.schedules:
                for rate in RATES if RIVAL in self.methods else ():
                    wanted += self.runs(task, RIVAL, rate, [SEARCH], schedule)
                for method in self.methods:
                    wanted += self.confirming(task, method, schedule)
        return [run for run in wanted if not self.store.is_made(run)]
