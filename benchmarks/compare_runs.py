"""The runs of `make compare`: what decides one, its training, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import time
from collections.abc import Callable
from typing import Any

import run_store
import torch
from optimizers import ENTRIES
from pages import RESULTS
from run_store import CODE, key_of, thinned, versions
from tasks import TASKS, Task
from torch import nn

from singd_core import Settings
from singd_core import settings as core_settings
from singd_torch import SINGD

RIVALS = {"AdamW": "AdamW", "Muon": "Muon", "SOAP": "SOAP/pytorch-optimizer"}  # entries by method
OURS = "SINGD"
GRADIENTS = "SINGD without rows"  # of the named parameters alone
DIAGONAL = "SINGD without rows, diagonal"
OF_MODEL = "SINGD, diagonal"  # of the model
OWN = OURS, GRADIENTS, DIAGONAL, OF_MODEL  # whose rate is a setting
# Methods of docs/rows.md alone. That page shows a linear decay and no other schedule.
BESIDES = {"PSGD": "PSGD/pytorch-optimizer", "Adafactor": "Adafactor"}
LINEAR = GRADIENTS, DIAGONAL, OF_MODEL, *BESIDES
WARM_UP = 20  # steps in which the rate of a rival grows

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What decides a training.

    Attributes:
        task: The task's name.
        method: The optimizer's name.
        rate: The rate of a rival; None for SINGD, whose rate is one of its settings.
        seed: Of the model's start and the batches.
        schedule: How the rate goes on.
        steps: Of training.
        batch: Examples in a step.
        settings: All settings of SINGD, those that were not given too, as JSON.
        given: Those that were given, as JSON.
    """

    task: str
    method: str
    rate: float | None
    seed: int
    schedule: str
    steps: int
    batch: int
    settings: str = ""
    given: str = dataclasses.field(default="{}", compare=False)

    @property
    def path(self) -> str:
        """The name of its file: the same for all that is the same."""
        named = dataclasses.asdict(self)
        del named["given"]
        rate = "" if self.rate is None else f"-{self.rate:g}"
        method = self.method.replace(",", "").replace(" ", "_")
        return f"{self.task}/{method}-{self.schedule}{rate}-seed{self.seed}-{key_of(named)}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a training ended with.

    Attributes:
        loss: The final training loss; infinite where it went astray.
        metric: The test metric; not a number there.
        seconds: The whole run.
        cpu_ms: Processor milliseconds a step.
        curve: Steps and the mean losses of the batches up to there.
        code: The fingerprint of the code that made it; empty for a rival.
        versions: Of the packages and the machine.
    """

    loss: float
    metric: float
    seconds: float
    cpu_ms: float
    curve: list[tuple[int, float]]
    code: str
    versions: dict[str, str]


def make(task: str, method: str, rate: float | None, seed: int, schedule: str, **given: Any) -> Run:
    """A run of a task as it is, SINGD's with the settings that follow from those given."""
    if method in (DIAGONAL, OF_MODEL):
        given = {"structures": ["diagonal", "diagonal"]} | given
    return Run(
        task=task,
        method=method,
        rate=rate,
        seed=seed,
        schedule=schedule,
        steps=TASKS[task].steps,
        batch=TASKS[task].batch,
        settings=json.dumps(resolved(given), sort_keys=True) if method in OWN else "",
        given=json.dumps(given, sort_keys=True),
    )


def resolved(given: dict[str, Any]) -> dict[str, Any]:
    """All that decides an optimizer `SINGD(model, **given)` but for its code."""
    parameters = inspect.signature(SINGD.__init__).parameters
    core = {field.name for field in dataclasses.fields(Settings)}
    left_out = core | {"self", "model", "params", "loss_average", "warn_unsupported", "given"}
    left_out |= {"processes"}  # there is one
    same = {"rounding", "seed"}  # in float32
    own = {name: p.default for name, p in parameters.items() if name not in left_out}
    own |= {name: value for name, value in given.items() if name not in core}
    chosen = {name: value for name, value in given.items() if name in core}
    everything = own | vars(core_settings(own["recipe"], **chosen))
    everything = {name: value for name, value in everything.items() if name not in same}
    plain: dict[str, Any] = json.loads(json.dumps(everything, default=str))
    return plain


# ---- training -----------------------------------------------------------------------------------


def optimizer(run: Run, model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The optimizer of a run; those that refresh something do so at every step."""
    if run.method in (GRADIENTS, DIAGONAL):
        return SINGD(model.named_parameters(), **json.loads(run.given))
    if run.method in (OURS, OF_MODEL):
        return SINGD(model, loss_average=task.loss_average, **json.loads(run.given))
    assert run.rate is not None
    return ENTRIES[(RIVALS | BESIDES)[run.method]].build(model, run.rate, 1, task.loss_average)


def factor(run: Run, step: int) -> float:
    """Of the rate in a step; SINGD warms up by itself."""
    warm = 1.0 if run.method in OWN else min(1.0, (step + 1) / WARM_UP)
    return warm * SCHEDULES[run.schedule](step / run.steps)


def train(run: Run) -> Result:
    """Train and evaluate."""
    start, task = time.perf_counter(), TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.model()
    chosen = optimizer(run, model, task)
    losses, cpu = stepped(task, model, chosen, functools.partial(factor, run), run.seed, run.steps)
    ends = task.evaluate(model) if math.isfinite(losses[-1]) else (math.inf, math.nan)
    astray = not math.isfinite(ends[0])
    return Result(
        loss=math.inf if astray else ends[0],
        metric=math.nan if astray else ends[1],
        seconds=time.perf_counter() - start,
        cpu_ms=1e3 * cpu,
        curve=thinned(losses),
        code=CODE if run.method in OWN else "",
        versions=versions(run.method),
    )


def stepped(
    task: Task,
    model: nn.Module,
    chosen: torch.optim.Optimizer,
    factor: Callable[[int], float],
    seed: int,
    steps: int,
) -> tuple[list[float], float]:
    """The losses of a training whose rate has this factor in each step, and its time of a step.

    It ends early if the loss is not finite. The time is the processor's, in seconds.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
    batches = list(task.batches(seed, steps))
    losses: list[float] = []
    cpu = time.process_time()
    for x, y in batches:
        chosen.zero_grad()
        loss = task.loss(model(x), y)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        try:
            chosen.step()
        except torch.linalg.LinAlgError:  # SOAP's, of a gradient that is not a number
            losses.append(math.nan)
            break
        schedule.step()
    return losses, (time.process_time() - cpu) / len(losses)


# ---- the store ----------------------------------------------------------------------------------


class Store(run_store.Store[Run, Result]):
    """All runs that were made; the newest of those that differ by code alone."""

    FOLDER = RESULTS / "compare"

    def is_made(self, run: Run) -> bool:
        """Whether a run is kept that the present code would make again."""
        found = self.get(run)
        return found is not None and (run.method not in OWN or found.code == CODE)

    def write(self, run: Run, result: Result) -> dict[str, Any]:
        """A run as JSON: null where it went astray."""
        data = dataclasses.asdict(run) | dataclasses.asdict(result)
        for name in ("settings", "given"):
            data[name] = json.loads(data[name] or "{}")
        for name in ("loss", "metric"):
            data[name] = data[name] if math.isfinite(data[name]) else None
        data["seconds"], data["cpu_ms"] = round(result.seconds, 2), round(result.cpu_ms, 3)
        data["curve"] = [[step, float(f"{loss:.5g}")] for step, loss in result.curve]
        return data

    def read(self, data: dict[str, Any]) -> tuple[Run, Result]:
        """The inverse of `write`."""
        run = {field.name: data.pop(field.name) for field in dataclasses.fields(Run)}
        run["settings"] = json.dumps(run["settings"], sort_keys=True) if run["settings"] else ""
        run["given"] = json.dumps(run["given"], sort_keys=True)
        data["loss"] = math.inf if data["loss"] is None else data["loss"]
        data["metric"] = math.nan if data["metric"] is None else data["metric"]
        data["curve"] = [(step, loss) for step, loss in data["curve"]]
        return Run(**run), Result(**data)
