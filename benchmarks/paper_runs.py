"""The runs behind docs/paper.md: what decides one, its training, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from typing import Any

import run_store
import torch
from measure import Trainee, anatomy
from pages import RESULTS
from paper_methods import build
from paper_tasks import PAPER_TASKS, PaperTask
from run_store import CODE, key_of, thinned, versions
from task_data import Split
from torch import Tensor, nn

CHECKS = 6  # evaluations over a training
WATCHED = 10  # steps between two sets of eigenvalues

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What decides a training.

    Attributes:
        task: The task's name.
        method: The optimizer's name.
        settings: Those that are not the method's own, as JSON.
        seed: Of the start and of the batches.
        dtype: Of weights, activations and state.
        checks: Evaluations of the test data over the training; 0 for a run that chooses settings.
        watch: Whether the smallest eigenvalues of what preconditions are looked at.
        steps: Of training.
    """

    task: str
    method: str
    settings: str
    seed: int
    dtype: str = "float32"
    checks: int = CHECKS
    watch: bool = False
    steps: int = 0

    @property
    def path(self) -> str:
        """The name of its file: the same for all that is the same."""
        key = key_of(dataclasses.asdict(self))
        method = self.method.replace(" ", "_")
        return f"{self.task}/{method}-{self.dtype}-seed{self.seed}-{key}.json"


@dataclasses.dataclass(kw_only=True)
class Result:
    """What a training showed; null stands for what is not finite.

    Attributes:
        losses: At most 30 stretches of the training: their last step and their mean loss.
        curve: Epochs, processor seconds of training, the mean training loss since the last point,
            test loss and test metric.
        validation: Loss and metric at the end.
        final: The mean training loss over the last tenth of the steps.
        failed: The step at which the loss was no longer finite.
        eigenvalues: Steps and the smallest eigenvalue of S + λI over all factors (KFAC), or of
            K Kᵀ and C Cᵀ.
        indefinite: The first step behind which an S + λI was not positive definite.
        where: Which factor that was.
        seconds: Processor seconds of the training's steps.
        state: Bytes of the optimizer's state between steps.
        peak: The most bytes that were allocated during the first steps.
        code: The fingerprint of the library's code.
        versions: Of packages, and the kind of processor.
    """

    losses: list[list[float]] = dataclasses.field(default_factory=list)
    curve: list[list[float | None]] = dataclasses.field(default_factory=list)
    validation: list[float | None] = dataclasses.field(default_factory=list)
    final: float | None = None
    failed: int | None = None
    eigenvalues: list[list[float]] = dataclasses.field(default_factory=list)
    indefinite: int | None = None
    where: str = ""
    seconds: float = 0.0
    state: int = 0
    peak: int = 0
    code: str = CODE
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def make(task: str, method: str, seed: int, settings: dict[str, Any], **given: Any) -> Run:
    """A run of a task as it is."""
    steps = given.pop("steps", 0) or PAPER_TASKS[task].steps
    said = json.dumps(settings, sort_keys=True)
    return Run(task=task, method=method, seed=seed, settings=said, steps=steps, **given)


# ---- training -----------------------------------------------------------------------------------


def differentiable(task: PaperTask, out: Tensor, y: Tensor) -> Tensor:
    """The training loss: in float32, so that none of its digits are lost at the end."""
    return task.loss(out.float(), y)


def inputs(x: Tensor, run: Run, device: torch.device) -> Tensor:
    """Inputs in the dtype of a run, but for whole numbers."""
    return x.to(device, DTYPES[run.dtype] if x.is_floating_point() else None)


def train(run: Run, device: torch.device | None = None) -> Result:
    """Train, evaluate, and measure the memory of the first steps."""
    device, task, result = device or torch.device("cpu"), PAPER_TASKS[run.task], Result()
    result.state, result.peak = _memory(run.task, run.method, run.dtype, device)
    result.versions = versions(run.method)
    torch.manual_seed(run.seed)
    model = task.model().to(device, DTYPES[run.dtype])
    given = json.loads(run.settings)
    optimizer = build(run.method, model, task.loss_average, **given)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=run.steps)
    epoch = task.batch / len(task.data()[0][1])
    losses: list[float] = []
    told = 0
    for step, (x, y) in enumerate(task.batches(run.seed, run.steps), 1):
        x, y = inputs(x, run, device), y.to(device)
        start = time.process_time()
        optimizer.zero_grad()
        loss = differentiable(task, model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            result.failed = step
            break
        loss.backward()
        optimizer.step()
        schedule.step()
        result.seconds += time.process_time() - start
        if run.watch:
            look(result, model, optimizer, step)
        if step * run.checks // run.steps > told:
            part, told = losses[told * run.steps // run.checks :], told + 1
            point = [step * epoch, result.seconds, sum(part) / len(part)]
            result.curve.append([*map(finite, [*point, *evaluate(run, model, device)])])
    if run.checks:
        result.losses = [[at, float(f"{loss:.5g}")] for at, loss in thinned(losses)]
    if result.failed is None:
        last = losses[-max(run.steps // 10, 1) :]
        result.final = finite(sum(last) / len(last))
        found = evaluate(run, model, device, task.validation())
        result.validation = [finite(value) for value in found]
    return result


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, device: torch.device, split: Split | None = None
) -> tuple[float, float]:
    """Loss and metric on a split, the test data if none is given."""
    task = PAPER_TASKS[run.task]
    x, y = task.data()[1] if split is None else split
    model.eval()

    def both(out: Tensor, y: Tensor) -> list[float]:
        out, y = out.float(), y.to(device)
        return [float(task.loss(out, y)), float(task.metric(out, y))]

    parts = zip(x.split(256), y.split(256), strict=True)
    found = [(both(model(inputs(part, run, device)), of), len(of)) for part, of in parts]
    model.train()
    means = [sum(values[i] * n for values, n in found) / len(y) for i in (0, 1)]
    return means[0], means[1]


def finite(value: float) -> float | None:
    """Five digits of a number, None for one that is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


@functools.cache
def _memory(task: str, method: str, dtype: str, device: torch.device) -> tuple[int, int]:
    """Bytes of state, and the peak over two refreshes; they do not depend on rates."""
    shown, run = PAPER_TASKS[task], make(task, method, 0, {}, dtype=dtype)

    def start() -> Trainee:
        torch.manual_seed(0)
        model = shown.model().to(device, DTYPES[dtype])
        x, y = next(shown.batches(0, 1))
        x, y = inputs(x, run, device), y.to(device)
        return Trainee(
            model,
            build(method, model, shown.loss_average, lr=1e-2),
            lambda out, y: differentiable(shown, out, y),
            *(x, y),
        )

    warm = start()  # what libraries keep of their first call is nobody's state
    for _ in range(2):
        warm.differentiate()
        warm.optimizer.step()
    del warm
    found = anatomy(start, lambda steps, seconds: steps >= 7, device)
    return found.state, found.peak


# ---- what preconditions -------------------------------------------------------------------------


def factors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """What the state holds of S (KFAC) or of dense K and C, by names."""
    return {
        f"{names[p]} {key.split('.')[0]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if key.split(".")[0] in ("S_K", "S_C", "K", "C")
        and value.ndim == 2
        and value.shape[0] == value.shape[1]
    }


def look(result: Result, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Keep whether all S + λI are positive definite and, now and then, the smallest eigenvalue."""
    names = {p: name.removesuffix(".weight") for name, p in model.named_parameters()}
    smallest = math.inf
    for name, stored in factors(optimizer, names).items():
        wide, damping = stored.double(), optimizer.param_groups[0]["damping"]
        if not wide.isfinite().all():
            continue
        kfac = " S_" in name
        damped = wide + damping * torch.eye(len(wide), dtype=wide.dtype) if kfac else wide
        if kfac and result.indefinite is None and torch.linalg.cholesky_ex(damped).info > 0:
            result.indefinite, result.where = step, name
        if step % WATCHED == 0 or step == result.indefinite:
            values = torch.linalg.eigvalsh(damped) if kfac else torch.linalg.svdvals(wide).square()
            smallest = min(smallest, float(values.min()))
    if math.isfinite(smallest):
        result.eigenvalues.append([step, float(f"{smallest:.5g}")])


# ---- the store ----------------------------------------------------------------------------------


class Store(run_store.Store[Run, Result]):
    """All runs that were made."""

    FOLDER = RESULTS / "paper"

    def write(self, run: Run, result: Result) -> dict[str, Any]:
        """A run as JSON."""
        data = dataclasses.asdict(run) | dataclasses.asdict(result)
        return data | {"settings": json.loads(run.settings), "seconds": round(result.seconds, 3)}

    def read(self, data: dict[str, Any]) -> tuple[Run, Result]:
        """The inverse of `write`."""
        run = {field.name: data.pop(field.name) for field in dataclasses.fields(Run)}
        run["settings"] = json.dumps(run["settings"], sort_keys=True)
        return Run(**run), Result(**data)
