"""The tables and the picture of docs/benchmarks.md that bench.py makes of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from optimizers import ENTRIES
from pages import digits, save_svg, table, write
from problems import PROBLEMS
from steps import Kind, Row

HEADER = (
    *("optimizer", "T", "step, of SGD's", "refresh, ms", "other, ms"),
    *("`step()` of a refresh, ms", "`step()` of another, ms"),
    *("state, MiB", "peak, MiB", "calls, refresh", "calls, other"),
)
AGAINST = (
    *("network", "structure", "time of singd's, T = 1", "T = 10"),
    *("step of AdamW's, T = 1", "T = 10", "state of AdamW's", "peak of AdamW's, T = 1", "T = 10"),
)


def publish(rows: list[Row], page: Path) -> None:
    """Write the page's tables and draw the picture beside it."""
    if not rows:
        return
    parts = []
    for device in sorted({row.device for row in rows}):
        mine = [row for row in rows if row.device == device]
        picture = page.with_name(f"benchmarks-{device}.svg")
        save_svg(draw(mine), picture)
        parts += [f"### {device.upper()}", f"![Times of whole steps over SGD's]({picture.name})"]
        parts += ["**SINGD as a share of `singd` 0.0.5 and of AdamW**"]
        parts += [table(AGAINST, against(mine), words=2)]
        for name in PROBLEMS:
            of_problem = [row for row in mine if row.problem == name]
            if of_problem:
                parts += [f"**{PROBLEMS[name].title}**", table(HEADER, map(cells, of_problem))]
        parts += ["Measured on " + "; ".join(sorted({row.environment for row in mine})) + "."]
        there = {row.optimizer for row in mine}
        absent = [n for n, entry in ENTRIES.items() if device in entry.devices and n not in there]
        if absent:
            parts += ["Not measured: " + ", ".join(absent) + "."]
    write(page, "make bench", "\n\n".join(parts))


def cells(row: Row) -> list[str]:
    """A row of a network's table; times include the optimizer's hooks and a whole step."""

    def both(value: str, *kinds: Kind | None) -> Iterator[str]:
        for kind in kinds:
            if kind is None:
                yield ""
            elif value == "calls":
                yield f"{kind.calls:,}"
            else:
                yield digits(1e3 * getattr(kind, value))

    kinds = row.refresh, row.other
    return [
        row.optimizer,
        str(row.T) if ENTRIES[row.optimizer].refreshes else "",
        digits(row.ratio),
        *both("whole", *kinds),
        *both("step", *kinds),
        digits(row.state / 2**20),
        digits(row.peak / 2**20),
        *both("calls", *kinds),
    ]


def against(rows: Iterable[Row]) -> Iterator[list[str]]:
    """Each network and structure of SINGD: its costs over the costs of singd 0.0.5 and of AdamW."""
    found = {(row.problem, row.optimizer, row.T): row for row in rows}
    for problem in PROBLEMS:
        adamw = found.get((problem, "AdamW", 1))
        for name in ENTRIES:
            method, _, structure = name.partition("/")
            both = [found.get((problem, name, T)) for T in (1, 10)]
            ten = both[1]
            if method not in ("SINGD", "SINGD-paper") or adamw is None or ten is None:
                continue
            theirs = [found.get((problem, f"singd-0.0.5/{structure}", T)) for T in (1, 10)]
            yield [
                problem,
                structure if method == "SINGD" else f"{structure} (paper)",
                *(_share(mine, other, "own") for mine, other in zip(both, theirs, strict=True)),
                *(_share(mine, adamw, "ratio") for mine in both),
                _share(ten, adamw, "state"),
                *(_share(mine, adamw, "peak") for mine in both),
            ]


def _share(mine: Row | None, other: Row | None, what: str) -> str:
    """What one costs over what another costs, where both were measured."""
    if mine is None or other is None:
        return ""
    return digits(getattr(mine, what) / getattr(other, what))


def draw(rows: list[Row]) -> Figure:
    """Every optimizer's step over SGD's, one panel for each network."""
    problems = [name for name in PROBLEMS if any(row.problem == name for row in rows)]
    names = [name for name in ENTRIES if any(row.optimizer == name for row in rows)]
    size = (1.5 + 2.3 * len(problems), 1.2 + 0.24 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for panel, problem in zip(panels, problems, strict=True):
        for T, face in ((1, "none"), (10, "C0")):
            mine = [
                row
                for row in rows
                if row.problem == problem and (row.T == T or not ENTRIES[row.optimizer].refreshes)
            ]
            panel.plot(
                [row.ratio for row in mine],
                [names.index(row.optimizer) for row in mine],
                "o",
                color="C0",
                markerfacecolor=face,
                label=f"T = {T}",
            )
        panel.set_xscale("log")
        panel.set_title(problem)
        panel.grid(axis="both", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower right")
    figure.supxlabel("time of a whole step over SGD's")
    return figure
