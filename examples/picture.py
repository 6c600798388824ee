"""What the demos keep and show of their runs: progress, a table and a picture."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import matplotlib

matplotlib.use("Agg")  # draws into a file, with no screen
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# The palette of Okabe and Ito and one violet, which people with any colour vision can tell apart.
# First-order optimizers are dotted; dashes part the colours that are closest in grey.
STYLES = {
    "AdamW": ("#000000", ":"),
    "SGD, momentum": ("#8c8c8c", ":"),
    "KFAC": ("#D55E00", "-"),
    "IKFAC": ("#E69F00", "-"),
    "SINGD dense": ("#0072B2", "-"),
    "SINGD diagonal": ("#56B4E9", "-"),
    "SINGD blockdiagonal": ("#009E73", "--"),
    "SINGD hierarchical": ("#CC79A7", "-"),
    "SINGD Toeplitz": ("#785EF0", "--"),
}


@dataclass
class Run:
    """What one optimizer did in one dtype."""

    losses: list[float] = field(default_factory=list)  # of each batch
    seconds: list[float] = field(default_factory=list)  # of training, up to and with each step
    indefinite_from: int | None = None  # KFAC: the first step at which S + λI was not positive
    train_loss: float = float("nan")
    accuracy: float = float("nan")
    bytes_per_parameter: float = float("nan")


def side_by_side(
    run: Callable[..., Run],
    optimizers: Collection[str],
    dtypes: Collection[str],
    steps: int,
    console: Console,
) -> dict[tuple[str, str], Run]:
    """`run(optimizer, dtype, after_step)` for each optimizer in each dtype, with a progress bar."""
    runs = {}
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    more = (TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn())
    with Progress(*columns, *more, console=console) as progress:
        total = len(dtypes) * len(optimizers) * steps
        task = progress.add_task("", total=total, loss=float("nan"))
        for dtype in dtypes:
            for name in optimizers:
                progress.update(task, description=f"{name}, {dtype}")
                show = partial(progress.update, task, advance=1)
                runs[name, dtype] = run(name, dtype, show)
    return runs


def table(runs: dict[tuple[str, str], Run]) -> Table:
    """One line for each optimizer and dtype."""
    shown = Table(title="Handwritten digits, after training")
    shown.add_column("\noptimizer", no_wrap=True)
    shown.add_column("\ndtype")
    for name in ("training\nloss", "test\naccuracy", "\nseconds", "state bytes\n/ parameter"):
        shown.add_column(name, justify="right")
    last = list(runs)[-1][0]
    for (optimizer, dtype), run in runs.items():
        cells = (
            f"{run.train_loss:.5f}" if run.train_loss < 100 else f"{run.train_loss:.0f}",
            f"{run.accuracy:.1%}",
            f"{run.seconds[-1]:.1f}",
            f"{run.bytes_per_parameter:.1f}",
        )
        failed = not run.train_loss < run.losses[0]
        style = "bold red" if failed else None
        shown.add_row(optimizer, dtype, *cells, style=style, end_section=optimizer == last)
    return shown


def draw(runs, path):
    """Loss over steps and over seconds, a column for each dtype, and memory.

    Args:
        runs: The runs by optimizer and dtype.
        path: The file to write.
    """
    names, dtypes = (list(dict.fromkeys(key[i] for key in runs)) for i in (0, 1))
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(dtypes) + 1, width_ratios=[1] * len(dtypes) + [0.9])
    first = None
    for column, dtype in enumerate(dtypes):
        over_steps = figure.add_subplot(grid[0, column], sharey=first)
        first = first or over_steps
        over_seconds = figure.add_subplot(grid[1, column], sharey=first)
        for name in names:
            run, (color, line) = runs[name, dtype], STYLES[name]
            loss = smooth(run.losses)
            look = {"color": color, "linestyle": line, "linewidth": 1.8, "label": name}
            over_steps.plot(range(1, len(loss) + 1), loss, **look)
            over_seconds.plot(run.seconds, loss, **look)
            if step := run.indefinite_from:
                text = f"step {step}: S + λI of\nKFAC is no longer\npositive definite"
                mark(over_steps, step, loss[step - 1], color, text)
        over_steps.set(title=dtype, xlabel="steps", yscale="log")
        over_seconds.set(xlabel="seconds of training")
        for axes in (over_steps, over_seconds):
            axes.grid(alpha=0.25)
            axes.set_ylabel("training loss (geometric mean, 10 batches)")
    lines, labels = first.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    bars(figure.add_subplot(grid[:, -1]), runs, names, dtypes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values, window=10):
    """The geometric mean of the last `window` values, of fewer at the start."""
    logs = [math.log(max(value, 1e-8)) for value in values]
    parts = [logs[max(0, i - window) : i] for i in range(1, len(logs) + 1)]
    return [math.exp(sum(part) / len(part)) for part in parts]


def mark(axes, x, loss, color, text):
    """A cross where KFAC's matrices stop being positive definite."""
    axes.plot(x, loss, marker="X", markersize=9, color=color, markeredgecolor="white", zorder=3)
    axes.annotate(
        text,
        (x, loss),
        xytext=(0.03, 0.76),
        textcoords="axes fraction",
        color=color,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8},
    )


def bars(axes, runs, names, dtypes):
    """Bytes of optimizer state for each parameter, a bar for each dtype."""
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        values = [runs[name, dtype].bytes_per_parameter for name in names]
        places = [row + (i - (len(dtypes) - 1) / 2) * height for row in range(len(names))]
        drawn = axes.barh(places, values, height, color=[STYLES[name][0] for name in names])
        for bar in drawn:
            bar.set(alpha=1.0 if i == 0 else 0.5)
        labels = [f"{value:.1f}  {dtype}" for value in values]
        axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set(title="optimizer state", xlabel="bytes for each parameter")
    axes.spines[["top", "right"]].set_visible(False)
