"""The tables and the picture of docs/benchmarks.md that race.py makes of its curves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from curves import ENTRANTS, Curve, Curves, Entrant, final, target
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
        rows = sorted((cells(e, mine, goal) for e, mine in found.items()), key=lambda row: row[0])
        header = [*HEADER, "of seeds", f"test {race.metric_name}"]
        parts += [title, table(header, [row for _, row in rows])]
    machines = {c.environment for found in raced.values() for mine in found.values() for c in mine}
    return [*parts, "Measured on " + "; ".join(sorted(machines)) + " for each training."]


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


def cells(entrant: Entrant, mine: list[Curve], goal: float) -> tuple[float, list[str]]:
    """A row of the table, with the time it is sorted by."""
    name, T = entrant
    arrivals = [curve.arrival(goal) for curve in mine]
    reached = [t for t in arrivals if math.isfinite(t)]
    steps = [curve.steps[i] for curve in mine if (i := curve.first(goal)) is not None]
    losses = [curve.losses[-1] for curve in mine]
    milliseconds = statistics.fmean(1e3 * c.seconds[-1] / c.steps[-1] for c in mine)
    all_there = len(reached) == len(mine)
    rate = f"{mine[0].run.rate:g}"
    rates = ENTRIES[name].rates
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
    """The loss over seconds, one panel for each task: the mean, and the band of the seeds."""
    figure = Figure(figsize=(11.0, 3.4 * math.ceil(len(raced) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(raced) / 2), min(len(raced), 2), squeeze=False)
    for panel, (task, found) in zip(panels.flat, raced.items(), strict=False):
        for (name, T), mine in found.items():
            i = ENTRANTS.index((name, T))
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            label = f"{name}, T = {T}" if ENTRIES[name].refreshes else name
            times = np.linspace(0.0, RACES[task].seconds, 80)[1:]
            lines = [np.interp(times, c.seconds, c.losses, left=math.nan) for c in mine]
            panel.plot(times, np.mean(lines, axis=0), label=label, **style)
            low, high = np.min(lines, axis=0), np.max(lines, axis=0)
            panel.fill_between(times, low, high, color=style["color"], alpha=0.1)
        goal = target(curves, task)
        panel.axhline(goal, color="black", linewidth=0.8, linestyle=":")
        panel.set(yscale="log", title=RACES[task].task.title, xlabel="seconds of training")
        panel.set_ylabel("training loss")
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure
