"""The tables of all settings and rates that were tried, and of what the runs cost."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping

from compare_plan import CHOICE, SEARCH, Plan, behind
from compare_runs import OURS, OWN, RIVALS, Result, Run, resolved
from pages import digits, table
from tasks import TASKS, TWELVE

Found = dict[Run, Result]


def tried(plan: Plan) -> str:
    """Every rate of a rival and every setting of SINGD, with the seeds that ran it."""
    rivals: dict[tuple[str, str], Found] = defaultdict(dict)
    ours: dict[str, Found] = defaultdict(dict)
    for run, result in plan.store:
        if run.method == OURS:
            ours[run.settings][run] = result
        elif run.method not in OWN:  # the other has its defaults alone
            rivals[run.method, run.schedule][run] = result
    parts = []
    if rivals:
        rows = [
            [
                *key,
                ", ".join(f"{rate:g}" for rate in sorted({run.rate or 0.0 for run in found})),
                _seeds(run for run in found if run.seed == SEARCH),
                _seeds(run for run in found if run.seed != SEARCH),
                str(len(found)),
            ]
            for key, found in sorted(rivals.items())
        ]
        header = ["rival", "schedule", "rates", "chosen with seed", "confirmed with", "runs"]
        parts.append(table(header, rows, words=5))
    if ours:
        default = json.dumps(resolved({}), sort_keys=True)
        rows = [_settings(found, ours.get(default, {}), default) for found in ours.values()]
        header = ["settings of SINGD", "code", "schedules", "runs", "seeds"]
        header += ["chosen on", "confirmed on", "other tasks"]
        parts.append(table(header, sorted(rows, key=lambda r: (r[0] != "default", r)), words=5))
        parts.append(
            f"Settings of SINGD are chosen on the twelve tasks with the seeds {_listed(CHOICE)}, "
            "and confirmed with other seeds and on other tasks. The last three columns are means "
            "of log(loss / the default's loss) over the runs of the same task, schedule and seed, "
            "each at most 1 in size. The code is a fingerprint of what made the runs."
        )
        parts.append(_by_task(ours, default))
    return "\n\n".join(parts)


def _by_task(ours: Mapping[str, Found], default: str) -> str:
    """The losses of the settings on each task that several were tried on."""
    losses: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for settings, found in ours.items():
        for run, result in found.items():
            if run.seed in CHOICE:
                losses[run.task, run.schedule][settings].append(result.loss)
    names = {settings: label(next(iter(found)), default) for settings, found in ours.items()}
    ordered = sorted(names, key=lambda settings: (settings != default, names[settings]))
    rows = [
        [task, schedule, *(digits(statistics.fmean(own[s])) if s in own else "-" for s in ordered)]
        for (task, schedule), own in sorted(losses.items(), key=lambda item: item[0][::-1])
        if len(own) > 1
    ]
    header = ["task", "schedule", *(names[settings] for settings in ordered)]
    return (
        f"Final training losses of these settings, means of the seeds {_listed(CHOICE)}, on the "
        f"tasks that others than the default were tried on:\n\n{table(header, rows, words=2)}"
    )


def _settings(found: Found, default: Found, default_settings: str) -> list[str]:
    places = {_place(run): result.loss for run, result in default.items()}
    parts: dict[str, list[float]] = {"chosen": [], "confirmed": [], "others": []}
    for run, result in found.items():
        if (loss := places.get(_place(run))) is not None:
            choosing = "chosen" if run.seed in CHOICE else "confirmed"
            part = choosing if run.task in TWELVE else "others"
            parts[part].append(behind(result.loss, loss))
    astray = sum(math.isinf(result.loss) for result in found.values())
    return [
        label(next(iter(found)), default_settings),
        ", ".join(sorted({result.code for result in found.values()})),
        ", ".join(sorted({run.schedule for run in found})),
        str(len(found)) + (f", {astray} astray" if astray else ""),
        _seeds(found),
        *(f"{statistics.fmean(part):.3f}" if part else "-" for part in parts.values()),
    ]


def against_rivals(plan: Plan) -> str:
    """The settings of a plan beside the best rival of the search, for each schedule and task."""
    said = []
    default = json.dumps(resolved({}), sort_keys=True)
    for schedule in plan.schedules:
        rows: list[list[str]] = []
        ratios: list[list[float]] = [[] for _ in plan.variants]
        for task in plan.tasks:
            best = _best_rival(plan, task, schedule)
            cells = [task, digits(best)]
            for variant, ratio in zip(plan.variants, ratios, strict=True):
                runs = [plan.run(task, OURS, None, s, schedule, **variant) for s in plan.seeds]
                found = [loss for run in runs if (loss := plan.store.loss(run)) is not None]
                if not found:
                    cells.append("-")
                    continue
                loss = statistics.fmean(found)
                ratio.append(behind(loss, best))
                cells.append(f"{digits(loss)} ({ratio[-1]:+.2f})")
            rows.append(cells)
        means = (f"{statistics.fmean(ratio):+.3f}" if ratio else "-" for ratio in ratios)
        rows.append(["mean", "", *means])
        named = (plan.run(plan.tasks[0], OURS, None, 0, schedule, **v) for v in plan.variants)
        header = ["task", "best rival, seed 0", *(label(run, default) for run in named)]
        said.append(f"{schedule}, seeds {_listed(plan.seeds)}:\n\n{table(header, rows)}")
    return "\n\n".join(said)


def _best_rival(plan: Plan, task: str, schedule: str) -> float:
    losses = (
        plan.searched(task, method, rate, schedule)
        for method in RIVALS
        for rate in plan.grid(task, method, schedule)
    )
    return min((loss for loss in losses if loss is not None), default=math.inf)


def label(run: Run, default: str) -> str:
    """The settings of a run of SINGD in words: those that are not the default's."""
    mine, ours = json.loads(run.settings), json.loads(default)
    said = [f"{n}={v}" for n, v in mine.items() if n not in ours or v != ours[n]]
    return ", ".join(said + [f"no {n}" for n in ours if n not in mine]) or "default"


def _place(run: Run) -> tuple[object, ...]:
    return run.task, run.schedule, run.seed, run.steps, run.batch


def _seeds(runs: Iterable[Run]) -> str:
    return _listed({run.seed for run in runs})


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "-"


def costs(plan: Plan) -> str:
    """Processor time of a step, and the hours of all runs."""
    steps: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run, result in plan.store:
        if run.method != OURS or run.given == "{}":
            steps[run.task, run.method].append(result.cpu_ms)
    methods = [OURS, *RIVALS]
    rows = [
        [task, *(_median(steps.get((task, method), [])) for method in methods)]
        for task in TASKS
        if any((task, method) in steps for method in methods)
    ]
    results = [result for _, result in plan.store]
    hours = sum(result.seconds for result in results) / 3600.0
    torches = ", ".join(sorted({result.versions["torch"] for result in results}))
    return (
        "Processor milliseconds of a training step, the median of all runs; SINGD with its default "
        "settings, SOAP with a refresh at every step:\n\n"
        + table(["task", *methods], rows)
        + f"\n\nThe {len(results)} runs took {hours:.1f} hours of one core, on "
        f"{platform.machine()} with torch {torches}. `make compare ARGS=--dry` says what is "
        "missing and what it will take."
    )


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"
