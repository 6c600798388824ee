"""The picture of docs/comparison.md: losses over steps of SINGD and rivals at their best rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from compare_plan import CONFIRM, Plan
from compare_runs import OURS, RIVALS, Result, Store
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tasks import TASKS, TWELVE

# In colours that all eyes tell apart.
COLOURS = {OURS: "#D55E00", "AdamW": "#0072B2", "Muon": "#009E73", "SOAP": "#CC79A7"}
COLUMNS = 4


def draw(store: Store, seeds: Sequence[int] = CONFIRM) -> Figure:
    """A panel for each of the twelve tasks with a linear decay: mean and range of the seeds."""
    plan = Plan(store, list(TWELVE), seeds=seeds)
    rows = math.ceil(len(TWELVE) / COLUMNS)
    figure = Figure(figsize=(2.9 * COLUMNS, 2.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False)
    for panel, task in zip(panels.flat, TWELVE, strict=False):
        for method in (*RIVALS, OURS):
            found = _of(plan, task, method)
            if found:
                _plot(panel, found, method)
        panel.set_yscale("log")
        title = TASKS[task].title.removesuffix(", loss summed over pixels")
        panel.set_title(title.removesuffix(" at 14 × 14"), fontsize=8)
        panel.tick_params(which="both", labelsize=6)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("loss of the training batches", fontsize=9)
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    shown = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[n] for n in shown],
        shown,
        loc="outside upper center",
        ncols=len(COLOURS),
        frameon=False,
    )
    return figure


def _of(plan: Plan, task: str, method: str) -> list[Result]:
    rate = None if method == OURS else plan.best(task, method, "linear")
    if method != OURS and rate is None:
        return []
    runs = [plan.run(task, method, rate, seed, "linear") for seed in plan.seeds]
    return [result for run in runs if (result := plan.store.get(run)) is not None]


def _plot(panel: Axes, found: Sequence[Result], method: str) -> None:
    steps = [step for step, _ in found[0].curve]
    losses = [np.interp(steps, *zip(*result.curve, strict=True)) for result in found]
    front = 3 if method == OURS else 2
    panel.plot(steps, np.mean(losses, axis=0), color=COLOURS[method], label=method, zorder=front)
    low, high = np.min(losses, axis=0), np.max(losses, axis=0)
    panel.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
