"""The tables and the picture of docs/benchmarks.md that race.py makes of its curves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from compare_picture import COLOURS
from curves import ENTRANTS, Curve, Curves, Entrant, final, target, tuning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optimizers import ENTRIES
from pages import digits, save_svg, table, write
from race_tasks import RACES

HEADER = ("optimizer", "T", "rate", "s to target", "of seeds", "steps", "ms a step", "final loss")


def publish(curves: Curves, page: Path) -> None:
    """Write the page's tables and draw the picture beside it."""
    raced = complete(curves)
    if not raced:
        return
    picture = page.with_name("benchmarks-race.svg")
    save_svg(draw(curves, raced), picture)
    parts = [f"![Training loss over seconds]({picture.name})", *tables(curves, raced)]
    write(page, "make race", "\n\n".join(parts))


def tables(curves: Curves, raced: dict[str, dict[Entrant, list[Curve]]]) -> list[str]:
    """A table of each task, and what it was measured on."""
    parts = []
    for task, found in raced.items():
        race, goal = RACES[task].task, target(curves, task)
        assert goal is not None
        title = f"**{race.title}**, training loss of {digits(goal)}"
        rows = sorted(
            (
                cells(e, mine, goal, [run.rate for run in tuning(curves, task, e)])
                for e, mine in found.items()
            ),
            key=lambda row: row[0],
        )
        header = [*HEADER, "of seeds", f"test {race.metric_name}"]
        parts += [title, table(header, [row for _, row in rows])]
    machines = {c.environment for found in raced.values() for mine in found.values() for c in mine}
    told = "Measured on " + "; ".join(sorted(machines)) + " for each training."
    runs = [run for task, found in raced.items() for e in found for run in tuning(curves, task, e)]
    others = {curves[run].environment for run in runs if run in curves} - machines
    if others:
        told += " Some rates were chosen by runs on " + "; ".join(sorted(others)) + "."
    return [*parts, told]


def complete(curves: Curves) -> dict[str, dict[Entrant, list[Curve]]]:
    """The curves that count, of the tasks that some entrant has finished."""
    raced = {task: counted(curves, task) for task in RACES}
    return {task: found for task, found in raced.items() if found}


def counted(curves: Curves, task: str) -> dict[Entrant, list[Curve]]:
    """The curves that count of each entrant that has them all."""
    found = {}
    for entrant in ENTRANTS:
        runs = final(curves, task, entrant)
        if runs and all(run in curves for run in runs):
            found[entrant] = [curves[run] for run in runs]
    return found


def cells(
    entrant: Entrant, mine: list[Curve], goal: float, rates: list[float]
) -> tuple[float, list[str]]:
    """A row of the table, with the time it is sorted by; `rates` are those that were tried."""
    name, T = entrant
    arrivals = [curve.arrival(goal) for curve in mine]
    reached = [t for t in arrivals if math.isfinite(t)]
    steps = [curve.steps[i] for curve in mine if (i := curve.first(goal)) is not None]
    losses = [curve.losses[-1] for curve in mine]
    milliseconds = statistics.fmean(1e3 * c.seconds[-1] / c.steps[-1] for c in mine)
    all_there = len(reached) == len(mine)
    rate = f"{mine[0].run.rate:g}"
    edge = len(rates) > 1 and mine[0].run.rate in (rates[0], rates[-1])
    return statistics.fmean(arrivals), [
        name,
        str(T) if ENTRIES[name].refreshes else "",
        rate + " (edge)" * edge,
        digits(statistics.fmean(arrivals)) if all_there else "not reached",
        _spread(reached) if all_there else f"{len(reached)} of {len(mine)}",
        f"{statistics.fmean(steps):.0f}" if all_there else "",
        digits(milliseconds),
        digits(statistics.fmean(losses)),
        _spread(losses),
        f"{statistics.fmean(curve.metric for curve in mine):.4f}",
    ]


def _spread(values: list[float]) -> str:
    return f"{digits(min(values))} to {digits(max(values))}"


def draw(curves: Curves, raced: dict[str, dict[Entrant, list[Curve]]]) -> Figure:
    """The loss over seconds, a panel for each task: mean and range of the seeds, and the target."""
    columns = min(len(raced), 3)
    rows = math.ceil(len(raced) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (task, found) in zip(panels.flat, raced.items(), strict=False):
        for entrant, mine in found.items():
            _plot(panel, entrant, mine, RACES[task].seconds)
        panel.axhline(target(curves, task), color="black", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.set_title(RACES[task].task.title, fontsize=9)
        panel.tick_params(which="both", labelsize=7)
    for panel in panels.flat[len(raced) :]:
        panel.set_axis_off()
    figure.supxlabel("seconds of training", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    lines = [panel.get_legend_handles_labels() for panel in panels.flat]
    handles = {name: line for found in lines for line, name in zip(*found, strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False
    )
    return figure


def _plot(panel: Axes, entrant: Entrant, mine: list[Curve], seconds: float) -> None:
    name, _ = entrant
    ours = name.startswith("SINGD/")
    label = "SINGD" if name == "SINGD/default" else name.removesuffix("/pytorch-optimizer")
    colour = {"SGD": "#999999", **COLOURS}.get(label, f"C{ENTRANTS.index(entrant) % 10}")
    times = np.linspace(0.0, seconds, 80)[1:]
    losses = [np.interp(times, c.seconds, c.losses, left=math.nan) for c in mine]
    panel.plot(times, np.mean(losses, axis=0), color=colour, label=label, zorder=3 if ours else 2)
    low, high = np.min(losses, axis=0), np.max(losses, axis=0)
    panel.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
