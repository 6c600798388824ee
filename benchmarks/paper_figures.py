"""The figures of docs/paper.md, from the runs that are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import save_svg
from paper_methods import METHODS
from paper_plan import GRID, LOOKS, PRECISION, SHOWN, Plan
from paper_runs import DTYPES, Result
from paper_tasks import PAPER_TASKS

# Colours of Okabe and Ito, and of Tol, that people with any colour vision can tell apart; first
# order is dotted, and markers part what is close in grey.
STYLES = {
    "SGD": ("#8c8c8c", ":", "s"),
    "AdamW": ("#000000", ":", "o"),
    "KFAC": ("#D55E00", "-", "v"),
    "IKFAC": ("#0072B2", "--", "^"),
    "INGD": ("#E69F00", "-", "D"),
    "SINGD diagonal": ("#56B4E9", "-", "o"),
    "SINGD block": ("#009E73", "--", "s"),
    "SINGD hierarchical": ("#CC79A7", "-", "P"),
    "SINGD rank": ("#882255", "-.", "X"),
    "SINGD Toeplitz": ("#785EF0", "--", "d"),
    "default": ("#000000", "-", "*"),
}
ASTRAY = 1e3  # a loss above it at the end
LABELS = {"default": "SINGD(model), default recipe", "INGD": "INGD (dense)"}


def label(method: str) -> str:
    """A method's name in words."""
    return LABELS.get(method, method)


def save(figure: Figure, path: Path) -> None:
    """Write a small picture: no minor ticks, and coordinates to a tenth of a point."""
    for axes in figure.axes:
        axes.minorticks_off()
    save_svg(figure, path)
    text = re.sub(r'(?<= d| x| y)="[^"]*"', _short, path.read_text())
    path.write_text(re.sub(r"\n +", "\n", text))


def _short(coordinates: re.Match[str]) -> str:
    return re.sub(r"(\.\d)\d+", r"\1", coordinates[0])


def theorem(found: dict[str, Any]) -> Figure:
    """The gap between K Kᵀ and KFAC's inverse over β₁, with slopes 1 and 2."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes, betas = figure.subplots(), np.array(found["beta"])
    lines = {
        "IKFAC, float64": STYLES["IKFAC"],
        "IKFAC, float32": ("#009E73", ":", "s"),
        "INGD, float64": STYLES["INGD"],
    }
    for name, (color, line, marker) in lines.items():
        axes.loglog(betas, found[name], color=color, linestyle=line, marker=marker, label=name)
    for power, start in ((2, found["IKFAC, float64"][0]), (1, found["INGD, float64"][0])):
        end = len(betas) // 2
        guide = 0.5 * start * (betas[:end] / betas[0]) ** power
        axes.loglog(betas[:end], guide, color="#8c8c8c", linewidth=1.0)
        axes.annotate(
            f"slope {power}",
            (betas[end - 2], guide[-2]),
            xytext=(6, -12),
            textcoords="offset points",
            color="#555555",
        )
    axes.set(
        xlabel=r"step size of the factors, $\beta_1$", ylabel="relative gap after 20 refreshes"
    )
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def _band(axes: Axes, method: str, lines: Sequence[tuple[Sequence[float], Sequence[Any]]]) -> None:
    """The mean of some seeds and their range; each seed by itself if one leaves the axes."""
    color, style, marker = STYLES[method]
    length = min((len(xs) for xs, _ in lines), default=0)
    if not length:
        return
    y = [[math.inf if v is None else v for v in ys] for _, ys in lines]
    look = {"color": color, "linestyle": style, "marker": marker, "markersize": 4}
    look |= {"markevery": max(length // 6, 1)}
    if max(map(max, y)) > ASTRAY:
        for i, ((xs, _), ys) in enumerate(zip(lines, y, strict=True)):
            there = next((j + 1 for j, v in enumerate(ys) if v > ASTRAY), len(ys))
            more = {"label": label(method)} if i == 0 else {"marker": ""}
            axes.plot(xs[:there], np.minimum(ys[:there], ASTRAY), linewidth=0.8, **look | more)
        return
    x, rows = np.mean([xs[:length] for xs, _ in lines], axis=0), np.array([ys[:length] for ys in y])
    axes.plot(x, rows.mean(0), label=label(method), linewidth=1.5, **look)
    axes.fill_between(x, rows.min(0), rows.max(0), color=color, alpha=0.15, linewidth=0)


def precision(plan: Plan) -> Figure:
    """Training losses on two networks in two precisions."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(len(PRECISION), len(DTYPES), sharex=True, sharey=True)
    for row, task in zip(panels, PRECISION, strict=True):
        for axes, dtype in zip(row, DTYPES, strict=True):
            shown = {method: of(plan, plan.precise(task, method, dtype)) for method in SHOWN}
            _tell_astray(axes, shown)
            for method, results in shown.items():
                lines = [tuple(zip(*r.losses, strict=True)) for r in results if r.losses]
                _band(axes, method, lines)  # type: ignore[arg-type]
            axes.set(yscale="log", ylim=(0.1, 30.0))
            axes.set_title(f"{_norm(task)}, {dtype}")
            axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss")
    _legend(figure, panels.flat, 3)
    return figure


def pair(plan: Plan) -> Figure:
    """Training losses of KFAC and IKFAC with equal settings in float32, a line for each seed."""
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    bounded = {"factor_bound": 0.5}
    looks = {
        f"β₁ = {GRID[0]['lr_cov']:g}": ({}, {}),
        f"β₁ = {LOOKS[0][1]['lr_cov']:g}": (LOOKS[0][1], LOOKS[0][1]),
        "IKFAC bounded": ({}, bounded),
    }
    panels = figure.subplots(len(PRECISION), len(looks), sharex=True, sharey=True)
    for row, task in zip(panels, PRECISION, strict=True):
        for axes, (title, changed) in zip(row, looks.items(), strict=True):
            pairs = {
                method: of(plan, plan.precise(task, method, "float32", **change))
                for method, change in zip(("KFAC", "IKFAC"), changed, strict=True)
            }
            for method, results in pairs.items():
                color, style, _ = STYLES[method]
                for i, result in enumerate(results):
                    steps, losses = zip(*result.losses, strict=True)
                    look = {"color": color, "linestyle": style, "linewidth": 1.6}
                    axes.plot(steps, losses, label=method if i == 0 else None, **look)
            _tell_astray(axes, pairs)
            axes.set(yscale="log", ylim=(0.1, 30.0), title=f"{_norm(task)}, {title}")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss")
    _legend(figure, panels.flat, 2)
    return figure


def _tell_astray(axes: Axes, runs: dict[str, Sequence[Result]]) -> None:
    """Say in a panel whose runs left it."""
    lost = {
        method: sum(r.final is None or r.final > ASTRAY for r in results)
        for method, results in runs.items()
    }
    lines = [f"{m}: {n} of {len(runs[m])} astray" for m, n in lost.items() if n]
    axes.text(
        0.98, 0.96, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=8
    )


def _norm(task: str) -> str:
    return f"{'with' if task == 'vgg-norm' else 'without'} batch norm"


def eigenvalues(plan: Plan) -> Figure:
    """The smallest eigenvalue of what KFAC inverts, and of K Kᵀ and C Cᵀ of IKFAC."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PRECISION), sharey=True)
    for axes, task in zip(panels, PRECISION, strict=True):
        for method in ("KFAC", "IKFAC"):
            for dtype in DTYPES:
                color, width = STYLES[method][0], 2.2 if dtype == "bfloat16" else 1.0
                what = "S + λI of KFAC" if method == "KFAC" else "K Kᵀ, C Cᵀ of IKFAC"
                for i, result in enumerate(of(plan, plan.precise(task, method, dtype))):
                    steps = [at for at, _ in result.eigenvalues]
                    values = [value for _, value in result.eigenvalues]
                    axes.plot(
                        *(steps, values),
                        color=color,
                        linewidth=width,
                        linestyle="-" if dtype == "bfloat16" else "--",
                        label=f"{what}, {dtype}" if i == 0 else None,
                    )
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set(title=_norm(task), xlabel="steps")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("smallest eigenvalue")
    _legend(figure, panels.flat, 2)
    return figure


def memory(found: dict[str, Any]) -> Figure:
    """Peak and state of all methods, as multiples of AdamW's in float32."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, i in zip(panels, ("state between steps", "peak"), (0, 1), strict=True):
        for j, dtype in enumerate(DTYPES):
            values = [found[f"{method}, {dtype}"][i] / 2**20 for method in METHODS]
            places = [k + (j - 0.5) * 0.38 for k in range(len(METHODS))]
            drawn = axes.barh(places, values, 0.38, color=("#0072B2", "#E69F00")[j], label=dtype)
            axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set(xscale="log", title=what, xlabel="MiB")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xticks((0.5, 1, 2, 5, 10, 20, 50, 100) if i == 0 else (20, 50, 100, 200))
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(METHODS)), [label(method) for method in METHODS])
    panels[0].invert_yaxis()
    _legend(figure, panels.flat, 2)
    return figure


def search(plan: Plan, task: str) -> Figure:
    """Test metric and test loss over epochs and over processor seconds."""
    rows = PAPER_TASKS[task].tested
    figure = Figure(figsize=(9.6, 1.0 + 2.8 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
    shown: list[float] = []
    for method in METHODS:
        results = of(plan, plan.confirmed(task, method, "float32"))
        results = [result for result in results if result.curve]
        for i, column in enumerate(rows.values()):
            for j in (0, 1):
                lines = [([p[j] for p in r.curve], [p[column] for p in r.curve]) for r in results]
                _band(panels[i][j], method, lines)  # type: ignore[arg-type]
        shown += [p[3] for r in results for p in r.curve if p[3] is not None]
    for axes, what in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(f"test {what}")
    for axes, what in zip(panels[-1], ("epochs", "processor seconds"), strict=True):
        axes.set_xlabel(what)
    low, high = min(shown), float(np.quantile(shown, 0.85))
    scale = "log" if high > 10.0 * low else "linear"
    panels[-1][0].set(yscale=scale, ylim=(0.9 * low, max(1.2 * high, 1.5 * low)))
    for axes in panels.flat:
        axes.grid(alpha=0.25)
    figure.suptitle(PAPER_TASKS[task].title)
    _legend(figure, panels.flat, 4)
    return figure


def of(plan: Plan, runs: Sequence[Any]) -> list[Result]:
    """What is kept of some runs."""
    return [result for run in runs if (result := plan.store.get(run)) is not None]


def _legend(figure: Figure, panels: Any, columns: int) -> None:
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9
    )
