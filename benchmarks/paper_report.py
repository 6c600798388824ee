"""The tables and sentences of docs/paper.md, from the runs that are kept."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paper_figures as figures
from pages import digits, table, write
from paper_figures import ASTRAY, label, of
from paper_measures import MEASURES, measured
from paper_methods import METHODS, OURS
from paper_plan import LOOKS, PRECISION, SEARCHED, SEEDS, SHOWN, Plan
from paper_runs import CHECKS, DTYPES, Result
from paper_tasks import PAPER_TASKS
from paper_theory import counts, memory, theorem

NOT_RUN = "not run"


def publish(plan: Plan, page: Path) -> None:
    """Write the page's tables and draw the pictures beside it."""
    theory, memory = (measured(name, plan.store.folder) for name in ("theorem", "memory"))
    pictures: dict[str, Any] = {
        "theorem": theory and figures.theorem(theory),
        "memory": memory and figures.memory(memory),
        "pair": figures.pair(plan),
        "precision": figures.precision(plan),
        "eigenvalues": figures.eigenvalues(plan),
        **{task: figures.search(plan, task) for task in SEARCHED if is_drawn(plan, task)},
    }
    for name, figure in pictures.items():
        if figure:
            figures.save(figure, page.with_name(f"paper-{name}.svg"))
    tell(plan, page)


def tell(plan: Plan, page: Path) -> None:
    """Write the page's tables."""
    found = {name: measured(name, plan.store.folder) for name in MEASURES}
    parts = {
        "theorem": theorem(found["theorem"]),
        "precision": precision(plan),
        "memory": memory(found["memory"]),
        "counts": counts(found["counts"]),
        "diagonal": diagonal(plan),
        "search": search(plan),
        "structures": structures(plan),
        "cost": cost(plan),
    }
    for name, text in parts.items():
        write(page, f"make paper: {name}", text or "No runs are kept.")


def is_drawn(plan: Plan, task: str) -> bool:
    """Whether there are curves to draw of a task."""
    return any(r.curve for m in METHODS for r in of(plan, plan.confirmed(task, m, "float32")))


# ---- numbers ------------------------------------------------------------------------------------


def spread(values: Sequence[float | None], places: str = ".3g") -> str:
    """The mean and the standard deviation, or how many went astray."""
    finite = [value for value in values if value is not None and value <= ASTRAY]
    if not values:
        return NOT_RUN
    if len(finite) < len(values):
        return f"astray in {len(values) - len(finite)} of {len(values)}"
    said = f"{statistics.fmean(finite):{places}}"
    return said if len(finite) < 2 else f"{said} ± {statistics.stdev(finite):.1g}"


def is_astray(result: Result) -> bool:
    """Whether a training ended with a loss that is not finite, or larger than any of use."""
    return result.final is None or result.final > ASTRAY


def losses(results: Sequence[Result]) -> list[float | None]:
    """The final training losses."""
    return [result.final for result in results]


def tested(results: Sequence[Result], column: int) -> list[float | None]:
    """The test loss (3) or metric (4) at the end; None of a run that went astray."""
    there = [not is_astray(result) and len(result.curve) == CHECKS for result in results]
    return [r.curve[-1][column] if ok else None for r, ok in zip(results, there, strict=True)]


# ---- the parts of the page ----------------------------------------------------------------------


def precision(plan: Plan) -> str:
    """KFAC, IKFAC and others in two precisions: losses, accuracies, and where KFAC fails."""
    lines, said = [], []
    for task in PRECISION:
        norm = "with" if task == "vgg-norm" else "without"
        best = {method: plan.best(plan.choice(task, method)) for method in SHOWN}
        for method, changed in [*((method, {}) for method in SHOWN), *LOOKS]:
            runs = [plan.precise(task, method, dtype, **changed) for dtype in DTYPES]
            found = [of(plan, each) for each in runs]
            settings = (
                NOT_RUN if best[method] is None else _settings((best[method] or {}) | changed)
            )
            cells = [spread(losses(results)) for results in found]
            cells += [spread(tested(results, 4)) for results in found]
            lines.append([norm, label(method), settings, *cells])
            if method == "KFAC":
                for dtype, results in zip(DTYPES, found, strict=True):
                    if results:
                        beta_1 = json.loads(runs[0][0].settings)["lr_cov"]
                        where = f"{norm} batch norm, β₁ = {beta_1:g}, {dtype}"
                        said.append(f"- {where}: {_positive(results)}")
    header = ["batch norm", "method", "settings"]
    header += [f"loss, {dtype}" for dtype in DTYPES] + [f"accuracy, {dtype}" for dtype in DTYPES]
    intro = "KFAC's S + λI, of S as it is stored:"
    return "\n\n".join([table(header, lines, words=3), intro, "\n".join(said)])


def _positive(results: Sequence[Result]) -> str:
    fails = [r for r in results if r.indefinite is not None]
    smallest = min((v for r in results for _, v in r.eigenvalues), default=math.nan)
    if not fails:
        return (
            f"positive definite in all of {len(results)} runs; its smallest eigenvalue was "
            f"{smallest:.2g}."
        )
    steps = ", ".join(f"{r.indefinite} ({_layer(r.where)})" for r in fails)
    return (
        f"not positive definite in {len(fails)} of {len(results)} runs, first behind the steps "
        f"{steps}; its smallest eigenvalue was {smallest:.2g}."
    )


def _layer(where: str) -> str:
    name, factor = where.split()
    return f"{factor} of layer {name}"


def _settings(given: dict[str, Any]) -> str:
    names = {"lr": "β₂", "damping": "λ", "lr_cov": "β₁", "alpha1": "α₁", "weight_decay": "decay"}
    said = [f"{names[key]} {value:g}" for key, value in given.items() if key in names]
    said += ["normalized"] * ("normalize_lr_cov" in given) + ["bounded"] * ("factor_bound" in given)
    return ", ".join(said) or "as it is"


def diagonal(plan: Plan) -> str:
    """Dense and diagonal factors after equal searches."""
    lines = []
    for task in PRECISION:
        for dtype in DTYPES:
            pair = [of(plan, plan.precise(task, m, dtype)) for m in ("INGD", "SINGD diagonal")]
            lines.append([PAPER_TASKS[task].title, f"6 settings, {dtype}", *_pair(pair)])
    for task in SEARCHED:
        for dtype in DTYPES:
            pair = [of(plan, plan.confirmed(task, m, dtype)) for m in ("INGD", "SINGD diagonal")]
            if any(pair):
                lines.append([PAPER_TASKS[task].title, f"8 settings, {dtype}", *_pair(pair)])
    header = ["task", "search", "test, dense", "test, diagonal", "loss, dense", "loss, diagonal"]
    return table(header, lines, words=2)


def _pair(pair: Sequence[Sequence[Result]]) -> list[str]:
    metrics, finals = ([tested(results, 4) for results in pair], [losses(r) for r in pair])
    return [spread(values) for values in (*metrics, *finals)]


def search(plan: Plan) -> str:
    """All methods on all tasks, with the pictures of those that have one."""
    parts = []
    for task in SEARCHED:
        shown = PAPER_TASKS[task]
        parts.append(f"### {shown.title}")
        if is_drawn(plan, task):
            parts.append(f"![Test {' and '.join(shown.tested)}](paper-{task}.svg)")
        begun = any(
            of(plan, plan.search(task, method)) for method in METHODS if method != "default"
        )
        parts.append(
            searched(plan, task) if begun else f"Not run yet: {plan.searching(task)} runs."
        )
    return "\n\n".join(parts)


def searched(plan: Plan, task: str) -> str:
    """All methods on a task."""
    lines, metric, shown = [], PAPER_TASKS[task].metric_name, PAPER_TASKS[task].tested
    for method in METHODS:
        runs = plan.search(task, method)
        made, best = len(of(plan, runs)), plan.best(runs)
        results, half = (of(plan, plan.confirmed(task, method, dtype)) for dtype in DTYPES)
        milliseconds = [1e3 * result.seconds / runs[0].steps for result in results]
        lines.append(
            [
                label(method),
                f"{made} of {len(runs)}",
                NOT_RUN if best is None else _settings(best),
                *(spread(tested(results, column), ".4g") for column in shown.values()),
                spread(losses(results)),
                spread(tested(half, 4), ".4g"),
                digits(statistics.fmean(milliseconds)) if results else NOT_RUN,
            ]
        )
    header = ["method", "searched", "best settings"]
    header += [f"test {what}" for what in shown]
    header += ["training loss", f"test {metric}, bfloat16", "ms a step"]
    return table(header, lines, words=3)


def structures(plan: Plan) -> str:
    """Which of two methods has the better mean test metric, task by task."""
    pairs = [
        ("SINGD hierarchical", "SINGD block"),
        ("SINGD block", "SINGD diagonal"),
        ("SINGD hierarchical", "SINGD diagonal"),
        ("SINGD diagonal", "AdamW"),
        ("SINGD hierarchical", "AdamW"),
        ("INGD", "AdamW"),
        ("default", "AdamW"),
        ("default", "SINGD hierarchical"),
        ("KFAC", "IKFAC"),
    ]
    lines = []
    for first, second in pairs:
        cells = []
        for dtype in DTYPES:
            said = [_versus(plan, task, first, second, dtype) for task in SEARCHED]
            known = [word for word in said if word]
            ahead = known.count("ahead")
            within = str(known.count("within"))
            cells += [f"{ahead} of {len(known)}", within] if known else [NOT_RUN, NOT_RUN]
        lines.append([label(first), label(second), *cells])
    header = ["method", "against"]
    header += [f"{what}, {dtype}" for dtype in DTYPES for what in ("ahead", "within the spread")]
    return table(header, lines, words=2)


def _versus(plan: Plan, task: str, first: str, second: str, dtype: str) -> str:
    """Whether the first is "ahead", "behind", or "within" the larger standard deviation."""
    pair = [tested(of(plan, plan.confirmed(task, m, dtype)), 4) for m in (first, second)]
    if any(len(values) < len(SEEDS) for values in pair):
        return ""
    finite = [[v for v in values if v is not None] for values in pair]
    full = [len(f) == len(SEEDS) for f in finite]
    if not all(full):
        return "ahead" if full[0] else "behind"
    sign = 1.0 if PAPER_TASKS[task].higher_is_better else -1.0
    gap = sign * (statistics.fmean(finite[0]) - statistics.fmean(finite[1]))
    if abs(gap) <= max(map(statistics.stdev, finite)):
        return "within"
    return "ahead" if gap > 0.0 else "behind"


def cost(plan: Plan) -> str:
    """What the runs took, and what is missing."""
    made, (spent, whole) = len(plan.store.results), plan.seconds()
    kinds = {result.versions.get("machine", "") for _, result in plan.store}
    torch = {result.versions.get("torch", "") for _, result in plan.store}
    codes = {result.code for run, result in plan.store if run.method in OURS}
    if plan.pending():  # some of them may turn out to be the same
        begin = f"{made} of at most {plan.total()} runs are made. Their"
        end = f" At their mean the whole takes {whole / 60:.0f}."
    else:
        begin, end = f"All {made} runs are made. Their", ""
    said = [
        f"{begin} steps took {spent / 60:.0f} minutes of one core, on "
        f"{' and '.join(sorted(kinds))} with torch {' and '.join(sorted(torch))}.{end}",
        f"Fingerprints of the library's code in these runs: {', '.join(sorted(codes))}.",
    ]
    return "\n\n".join(said)
