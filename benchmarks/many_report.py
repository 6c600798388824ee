"""The tables of `many.py`, from the runs that are kept."""

from __future__ import annotations

import dataclasses

from compare_report import Entry, is_ahead
from compare_runs import OF_MODEL, OURS
from many_runs import CONFIRM, RATES, RIVAL, SCHEDULES, SEARCH, Plan
from many_tasks import TASKS
from pages import table

TITLES = {"constant": "A constant rate", "linear": "A linear decay to 0"}
BRIEFLY = {"constant": "at a constant rate", "linear": "with a decay"}
NAMES = {OURS: "`SINGD(model)`", OF_MODEL: '`structures="diagonal"`'}


def row(plan: Plan, task: str, schedule: str) -> dict[str, Entry]:
    """The methods that have runs of a task."""
    rate, found = plan.rate(task, schedule), {}
    for method in (RIVAL, *NAMES):
        if results := plan.results(task, method, schedule):
            fewer = f" of {len(results)} seeds" if len(results) < len(CONFIRM) else ""
            edge = "†" if method == RIVAL and rate in (RATES[0], RATES[-1]) else ""
            given = results, rate if method == RIVAL else None, edge + fewer
            found[method] = Entry(*given)  # type: ignore[arg-type]
    return found


def verdict(mine: Entry, rival: Entry) -> str:
    """Ahead, level or behind: level if the means differ by no more than a standard deviation."""
    if not is_ahead(mine, [rival], slack=True):
        return "behind"
    return "level" if is_ahead(rival, [mine], slack=True) else "ahead"


def losses(plan: Plan, schedule: str) -> str:
    """The table of a schedule, and its counts."""
    lines: list[list[str]] = []
    verdicts: dict[str, list[str]] = {method: [] for method in NAMES}
    for task in plan.tasks:
        found = row(plan, task, schedule)
        if not found:
            continue
        best, cells = min(found.values(), key=lambda entry: entry.loss), []
        for method in (RIVAL, *NAMES):
            entry = found.get(method, Entry([]))
            cells.append(entry.cell(False, entry is best, method == RIVAL and bool(entry.results)))
            if method in NAMES:
                both = method in found and RIVAL in found
                cells.append(verdict(entry, found[RIVAL]) if both else "")
                verdicts[method] += cells[-1:] if both else []
        lines.append([task, *cells])
    if not lines:
        return ""
    counts = [
        f"{NAMES[method]} is ahead of AdamW on {said.count('ahead')} of {len(said)} tasks, level "
        f"on {said.count('level')} and behind on {said.count('behind')}."
        for method, said in verdicts.items()
        if said
    ]
    edge = sum(plan.rate(line[0], schedule) == RATES[-1] for line in lines)
    counts.append(
        f"On {edge} tasks the largest rate, {RATES[-1]:g}, is the best of AdamW's: "
        "a larger one may be better there."
    )
    header = ["task", f"AdamW, best of {len(RATES)}"]
    header += [part for name in NAMES.values() for part in (name, "")]
    return "\n\n".join([table(header, lines), *counts])


def behind(plan: Plan) -> str:
    """A sentence for each task on which SINGD at its defaults is behind."""
    said = []
    for task in plan.tasks:
        parts = []
        for schedule in plan.schedules:
            found = row(plan, task, schedule)
            if OURS in found and RIVAL in found:
                mine, rival = found[OURS], found[RIVAL]
                if verdict(mine, rival) == "behind":
                    plain = (dataclasses.replace(entry, mark="") for entry in (mine, rival))
                    cells = [entry.cell(False, False, False) for entry in plain]
                    parts.append(f"{BRIEFLY[schedule]} {cells[0]} against {cells[1]}")
        if parts:
            said.append(f"- **{TASKS[task].title}** (`{task}`): {', and '.join(parts)}.")
    return "\n".join(said) or "None."


def markdown(plan: Plan) -> str:
    """All that the page shows."""
    what = [[task, TASKS[task].title, str(TASKS[task].steps)] for task in plan.tasks]
    legend = (
        f"Means of the seeds {', '.join(map(str, CONFIRM))}, with standard deviations; less is "
        f"better. The rate of AdamW, which seed {SEARCH} chose, is in brackets. Bold is the best "
        "of a row. †: the rate is at the edge of those tried. Level: the means differ by no more "
        "than the larger standard deviation."
    )
    parts = ["## The tasks", table(["task", "what it is", "steps"], what, words=2), legend]
    for schedule in SCHEDULES:
        if schedule in plan.schedules and (shown := losses(plan, schedule)):
            parts += [f"## {TITLES[schedule]}", shown]
    parts += ["## Where `SINGD(model)` is behind", "SINGD is named first.", behind(plan)]
    return "\n\n".join(parts)
