"""The runs of `make compare`: what decides one, its training, and the file that keeps it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from optimizers import ENTRIES
from pages import RESULTS, ROOT
from tasks import TASKS, Task
from torch import nn

from singd_core import Settings
from singd_core import settings as core_settings
from singd_torch import SINGD

FOLDER = RESULTS / "compare"
SOURCES = (ROOT / "singd_core", ROOT / "frontends" / "singd_torch")
RIVALS = {"AdamW": "AdamW", "Muon": "Muon", "SOAP": "SOAP/pytorch-optimizer"}  # entries by method
OURS = "SINGD"
GRADIENTS = "SINGD without rows"  # of the parameters alone
DIAGONAL = "SINGD without rows, diagonal"
OWN = OURS, GRADIENTS, DIAGONAL  # whose rate is a setting
# Those of docs/rows.md alone, in which nothing but a linear decay is shown.
BESIDES = {"PSGD": "PSGD/pytorch-optimizer", "Adafactor": "Adafactor"}
LINEAR = GRADIENTS, DIAGONAL, *BESIDES
WARM_UP = 20  # steps in which the rate of a rival grows
POINTS = 30  # of a curve

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
        key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
        rate = "" if self.rate is None else f"-{self.rate:g}"
        method = self.method.replace(",", "").replace(" ", "_")
        return f"{self.task}/{method}-{self.schedule}{rate}-seed{self.seed}-{key}.json"


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
    if method == DIAGONAL:
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
    left_out |= {"processes"}  # of which there is one
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
        return SINGD(model.parameters(), **json.loads(run.given))
    if run.method == OURS:
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
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: factor(run, step))
    batches = list(task.batches(run.seed, run.steps))
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
    cpu = (time.process_time() - cpu) / len(losses)
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


def thinned(losses: list[float]) -> list[tuple[int, float]]:
    """At most 30 points: the last step of each stretch and the mean of its finite losses."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    size = max(-(-len(finite) // POINTS), 1)
    starts = range(0, len(finite), size)
    stretches = [finite[i : i + size] for i in starts]
    return [(i + len(s), statistics.fmean(s)) for i, s in zip(starts, stretches, strict=True)]


def versions(method: str) -> dict[str, str]:
    """What may change the numbers a little."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    found["machine"] = platform.machine()
    if method in ("PSGD", "SOAP"):
        found["pytorch-optimizer"] = importlib.metadata.version("pytorch-optimizer")
    return found


# ---- the code that made a run -------------------------------------------------------------------


def fingerprint(sources: tuple[Path, ...] = SOURCES) -> str:
    """Of SINGD's code: another one for other code, the same for other comments or docstrings."""
    found = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")):
            name = path.relative_to(source).as_posix()
            if not name.startswith("testing/"):
                found.update(f"{source.name}/{name}:{_said(ast.parse(path.read_text()))}".encode())
    return found.hexdigest()[:12]


def _said(node: Any) -> str:
    """A syntax tree in letters that are the same in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_said, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and _is_text(body[0]):
        fields["body"] = body[1:]
    said = (f"{name}={_said(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(node).__name__}({','.join(said)})"


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


CODE = fingerprint()  # as it was imported, whatever becomes of the files


# ---- the store ----------------------------------------------------------------------------------


class Store:
    """All runs that were made, one file each; the newest of those that differ by code alone."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.results = dict(map(read, sorted(folder.glob("*/*.json"))))

    def __iter__(self) -> Iterator[tuple[Run, Result]]:
        return iter(self.results.items())

    def get(self, run: Run) -> Result | None:
        """What is kept of a run, of whatever code."""
        return self.results.get(run)

    def is_made(self, run: Run) -> bool:
        """Whether a run is kept that the present code would make again."""
        found = self.results.get(run)
        return found is not None and (run.method not in OWN or found.code == CODE)

    def loss(self, run: Run) -> float | None:
        """The final loss of a run, if it was made."""
        found = self.results.get(run)
        return None if found is None else found.loss

    def add(self, run: Run, result: Result) -> None:
        """Keep a run; its file is there as a whole or not at all."""
        self.results.pop(run, None)  # the key that stays would be the old one
        self.results[run] = result
        path = self.folder / run.path
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(write(run, result))
        new.replace(path)


def write(run: Run, result: Result) -> str:
    """A run as JSON: null where it went astray."""
    data = dataclasses.asdict(run) | dataclasses.asdict(result)
    for name in ("settings", "given"):
        data[name] = json.loads(data[name] or "{}")
    for name in ("loss", "metric"):
        data[name] = data[name] if math.isfinite(data[name]) else None
    data["seconds"], data["cpu_ms"] = round(result.seconds, 2), round(result.cpu_ms, 3)
    data["curve"] = [[step, float(f"{loss:.5g}")] for step, loss in result.curve]
    return json.dumps(data) + "\n"


def read(path: Path) -> tuple[Run, Result]:
    """The run of a file."""
    data = json.loads(path.read_text())
    run = {field.name: data.pop(field.name) for field in dataclasses.fields(Run)}
    run["settings"] = json.dumps(run["settings"], sort_keys=True) if run["settings"] else ""
    run["given"] = json.dumps(run["given"], sort_keys=True)
    data["loss"] = math.inf if data["loss"] is None else data["loss"]
    data["metric"] = math.nan if data["metric"] is None else data["metric"]
    data["curve"] = [(step, loss) for step, loss in data["curve"]]
    return Run(**run), Result(**data)
