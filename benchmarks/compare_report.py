"""The tables of `make compare`, from the runs that are kept."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from compare_plan import CONFIRM, EXTENSIONS, SEARCH, Plan
from compare_runs import (
    BESIDES,
    DIAGONAL,
    GRADIENTS,
    OF_MODEL,
    OURS,
    RIVALS,
    SCHEDULES,
    WARM_UP,
    Result,
    Store,
)
from compare_tried import costs, tried
from pages import digits, table
from tasks import BATCHES, HELD_OUT, SCALES, SHORT, TASKS, TWELVE

TITLES = {
    "linear": "A linear decay",
    "cosine": "A cosine",
    "constant": "A constant rate",
}
GROUPS = {
    "the twelve tasks": list(TWELVE),
    "batches of 8 and of 1024": list(BATCHES),
    "a quarter of the steps": list(SHORT),
    "held out, tasks that no setting was chosen on": list(HELD_OUT),
    "inputs of other scales": list(SCALES),
}
KINDS = {"one": "at one rate for all tasks", "best": "at its best rate for the task"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method at one rate on one task.

    Attributes:
        results: Of the seeds.
        rate: Of a rival.
        mark: Behind the numbers.
    """

    results: Sequence[Result]
    rate: float | None = None
    mark: str = ""

    @property
    def loss(self) -> float:
        """The mean final loss: infinite if a seed went astray."""
        return statistics.fmean(r.loss for r in self.results) if self.results else math.inf

    @property
    def metric(self) -> float:
        """The mean test metric."""
        return statistics.fmean(r.metric for r in self.results) if self.results else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation of the losses."""
        finite = len(self.results) > 1 and math.isfinite(self.loss)
        return statistics.stdev(r.loss for r in self.results) if finite else 0.0

    def cell(self, test: bool, bold: bool, with_rate: bool) -> str:
        """The numbers as the tables show them."""
        if not self.results:
            return "-"
        value = self.metric if test else self.loss
        said = f"{value:.4g}" if math.isfinite(value) else "astray"
        said = f"**{said}**" if bold else said
        if not test and self.spread:
            said += f" ± {float(f'{self.spread:.2g}'):g}"
        return said + self.mark + (f" ({self.rate:g})" if with_rate else "")


Row = dict[tuple[str, str], Entry]  # by method and "default", "one" or "best"


# ---- what the tables say ------------------------------------------------------------------------


def row(plan: Plan, task: str, schedule: str) -> Row:
    """All methods on a task."""
    found: Row = {(OURS, "default"): _entry(plan, task, OURS, None, schedule)}
    for kind in KINDS:
        for method in RIVALS:
            one, best = plan.one(method, schedule), plan.best(task, method, schedule)
            rate = one if kind == "one" else best
            found[method, kind] = (
                Entry([]) if rate is None else _entry(plan, task, method, rate, schedule)
            )
    return found


def _entry(plan: Plan, task: str, method: str, rate: float | None, schedule: str) -> Entry:
    results = _of(plan, task, method, rate, schedule, plan.seeds)
    if rate is None:
        fewer = len(results) < len(plan.seeds)
        return Entry(results, mark=f" of {len(results)} seeds" if fewer else "")
    mark = ""
    if len(results) < len(plan.seeds):
        mark, results = "\\*", _of(plan, task, method, rate, schedule, [SEARCH])
    rates = plan.grid(task, method, schedule)
    if rate in (rates[0], rates[-1]) and rate == plan.best(task, method, schedule):
        mark += "†"
    return Entry(results, rate, mark)


def _of(
    plan: Plan, task: str, method: str, rate: float | None, schedule: str, seeds: Sequence[int]
) -> list[Result]:
    runs = (plan.run(task, method, rate, seed, schedule) for seed in seeds)
    return [result for run in runs if (result := plan.store.get(run)) is not None]


def is_ahead(mine: Entry, rivals: Sequence[Entry], slack: bool = False) -> bool:
    """Whether a loss is the lowest; with slack, at most one standard deviation above it."""
    best = min(rivals, key=lambda entry: entry.loss)
    allowed = max(mine.spread, best.spread) if slack else 0.0
    return mine.loss < best.loss + allowed


def counts(rows: Sequence[Row]) -> list[str]:
    """In how many rows SINGD is ahead, as sentences."""
    said = []
    for kind, words in KINDS.items():
        pairs = [
            (r[OURS, "default"], {m: r[m, kind] for m in RIVALS})
            for r in rows
            if all(r[key].results for key in [(OURS, "default"), *((m, kind) for m in RIVALS)])
        ]
        if not pairs:
            continue
        ahead, close = (
            sum(is_ahead(mine, list(rivals.values()), slack) for mine, rivals in pairs)
            for slack in (False, True)
        )
        each = (
            f"{m} on {sum(is_ahead(mine, [rivals[m]]) for mine, rivals in pairs)}" for m in RIVALS
        )
        said.append(
            f"Each rival {words}: SINGD is ahead of every rival on {ahead} of {len(pairs)} tasks, "
            f"and ahead or within one standard deviation on {close}; it is ahead of "
            f"{', of '.join(each)}."
        )
    return said


# ---- Markdown -----------------------------------------------------------------------------------


def losses(plan: Plan, schedule: str, tasks: Sequence[str], test: bool = False) -> str:
    """The table of final losses, or of test metrics."""
    rows = {task: row(plan, task, schedule) for task in tasks}
    rows = {task: r for task, r in rows.items() if any(entry.results for entry in r.values())}
    if not rows:
        return ""
    ones = {m: plan.one(m, schedule) for m in RIVALS}
    header = ["task", "SINGD"]
    header += [m if ones[m] is None else f"{m} at {ones[m]:g}" for m in RIVALS]
    header += [f"{m}, best" for m in RIVALS]
    if test:
        header.insert(1, "test")
    lines = []
    for name, found in rows.items():
        better = max if test and TASKS[name].higher_is_better else min
        values = [e.metric if test else e.loss for e in found.values() if e.results]
        top = better((v for v in values if math.isfinite(v)), default=math.nan)
        cells = [
            e.cell(test, (e.metric if test else e.loss) == top, kind == "best" and not test)
            for (_, kind), e in found.items()
        ]
        lines.append([name, *([TASKS[name].metric_name] if test else []), *cells])
    said = table(header, lines, words=1 + test)
    return said if test else "\n\n".join([said, *counts(list(rows.values()))])


def brief(store: Store, seeds: Sequence[int] = CONFIRM) -> str:
    """The table of README.md: the default beside each rival at its best rate for the task."""
    plan = Plan(store, list(TASKS), seeds=seeds)
    rows = [row(plan, task, "linear") for task in TWELVE]
    lines = []
    for task, found in zip(TWELVE, rows, strict=True):
        shown = [found[OURS, "default"], *(found[m, "best"] for m in RIVALS)]
        top = min(entry.loss for entry in shown)
        cells = [digits(e.loss) if math.isfinite(e.loss) else "-" for e in shown]
        bold = [f"**{c}**" if e.loss == top else c for c, e in zip(cells, shown, strict=True)]
        lines.append([TASKS[task].title, *bold])
    header = ["", "SINGD", *(f"{m}, best rate" for m in RIVALS)]
    return "\n\n".join([table(header, lines), *counts(rows)])


def without_rows(store: Store, seeds: Sequence[int] = CONFIRM) -> str:
    """The table of docs/rows.md: with rows and without, and each rival at its best rate."""
    plan, lines, rows = Plan(store, list(TASKS), seeds=seeds), [], []
    own = {GRADIENTS: "without rows", OURS: "with rows"}
    own |= {OF_MODEL: "diagonal, by the model", DIAGONAL: "diagonal, by names"}
    rivals = [*RIVALS, *BESIDES]
    for task in TASKS:
        shown = {m: _entry(plan, task, m, None, "linear") for m in own}
        if not shown[GRADIENTS].results:
            continue
        for method in rivals:
            rate = plan.best(task, method, "linear")
            made = rate is not None
            shown[method] = _entry(plan, task, method, rate, "linear") if made else Entry([])
        top = min(entry.loss for entry in shown.values() if entry.results)
        cells = (e.cell(False, e.loss == top, with_rate=False) for e in shown.values())
        lines.append([task, *cells])
        if task in TWELVE:
            rows.append(shown)
    if not lines:
        return "No runs are kept."
    header = ["task", *own.values(), *(f"{m}, best" for m in rivals)]
    said = [
        f"Of the twelve tasks, SINGD {own[mine]} is ahead of {each}."
        for mine, others in (
            (GRADIENTS, [OURS, *rivals]),
            (OF_MODEL, [DIAGONAL, *rivals]),
            (DIAGONAL, [OF_MODEL, *rivals]),
        )
        if (each := _ahead_of(rows, mine, others, own))
    ]
    return "\n\n".join([table(header, lines), *said])


def _ahead_of(
    rows: Sequence[dict[str, Entry]], mine: str, others: Sequence[str], own: dict[str, str]
) -> str:
    """On how many tasks one method is ahead of each of the others."""
    said = []
    for other in others:
        pairs = [(r[mine], r[other]) for r in rows if r[mine].results and r[other].results]
        ahead = sum(is_ahead(one, [two]) for one, two in pairs)
        name = f"SINGD {own[other]}" if other in own else other
        said += [f"{name} on {ahead} of {len(pairs)}"] if pairs else []
    return ", of ".join(said)


def quick(plan: Plan) -> str:
    """What a short comparison found."""
    return losses(plan, plan.schedules[0], plan.tasks)


def markdown(store: Store, seeds: Sequence[int] = CONFIRM) -> str:
    """All that the page shows."""
    plan = Plan(store, list(TASKS), seeds=seeds)
    parts = [_legend(seeds)]
    for schedule in SCHEDULES:
        for title, tasks in GROUPS.items():
            if found := losses(plan, schedule, tasks):
                metrics = losses(plan, schedule, tasks, test=True)
                parts += [f"## {TITLES[schedule]}: {title}", "Final training loss:", found]
                parts += ["Test metrics of the same runs:", metrics]
    parts += ["## All that was tried", tried(plan), "## What it costs", costs(plan)]
    return "\n\n".join(parts)


def _legend(seeds: Sequence[int]) -> str:
    lines = ["| task | what it is | steps | batch |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {n} | {t.title} | {t.steps} | {t.batch} |" for n, t in TASKS.items()]
    said = (
        f"Means of the seeds {', '.join(map(str, seeds))}, with standard deviations. "
        "The rate of a rival is in brackets. Bold is the best of a row. "
        f"\\*: seed {SEARCH} alone, by which the rates were chosen. "
        f"†: the best rate is at the edge of those tried, after {EXTENSIONS} more on that side. "
        f"The rate of a rival grows over the first {WARM_UP} steps."
    )
    return "\n".join([*lines, "", said])
