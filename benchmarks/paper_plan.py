"""Which runs docs/paper.md needs, the cheap and small ones first.

Two networks show KFAC, IKFAC and others in two precisions: six settings each are tried in float32
with one seed, and the best are run with three more seeds in float32 and in bfloat16. IKFAC has
KFAC's settings. Some are looked at with a smaller step of the factors, too. On five tasks all
methods are searched: eight random settings each are tried with one seed in float32. The best by
validation is run with three other seeds in both precisions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paper_methods import FIRST_ORDER, METHODS, OURS
from paper_runs import Run, Store, make
from paper_tasks import LARGE, PAPER_TASKS

SEARCH = 0  # the seed that chooses
SEEDS = (1, 2, 3)  # the seeds that are shown
SETTINGS = 8  # of a random search
PRECISION = ("vgg", "vgg-norm")
SEARCHED = ("vit", "vgg", "transformer", "resnet", "gcn")
SHOWN = ("KFAC", "IKFAC", "INGD", "SINGD diagonal", "AdamW", "default")  # in two precisions

# Ranges of the random search, all but alpha1's logarithmic.
SPACE: dict[str, tuple[float, float]] = {
    "lr": (5e-4, 5e-2),
    "weight_decay": (1e-5, 1e-2),
    "damping": (3e-3, 0.3),
    "lr_cov": (0.01, 0.2),
    "alpha1": (0.0, 0.9),
}
RATES = {"SGD": (3e-3, 0.3), "AdamW": (3e-4, 3e-2)}
LARGER = {"gcn": 20.0}  # gradients are small on these: times the rates of all but AdamW
PERIODS = {"gcn": 1}  # its curvatures are small, and take many refreshes to learn
T = 2  # of the others

# The small grid of the two precisions.
GRID: list[dict[str, Any]] = [
    {"lr": lr, "damping": damping, "lr_cov": 0.1, "T": T}
    for lr, damping in itertools.product((1e-3, 3e-3, 1e-2), (0.01, 0.1))
]
# Other looks at the best settings: a smaller β₁, and steps of the factors that the authors' rule or
# this library's bounds.
LOOKS: list[tuple[str, dict[str, Any]]] = [
    *((method, {"lr_cov": 0.03}) for method in ("KFAC", "IKFAC", "INGD")),
    *((method, {"normalize_lr_cov": True}) for method in ("IKFAC", "INGD")),
    *((method, {"factor_bound": 0.5}) for method in ("IKFAC", "INGD")),
]
ADAMW_GRID: list[dict[str, Any]] = [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2)]


def drawn(task: str, method: str) -> list[dict[str, Any]]:
    """The settings of a random search: every setting's range is cut in eight, a draw from each.

    The draws are the same for all methods, and mapped to the ranges of each.
    """
    if method == "default":
        return [{}]
    rng = random.Random(task)
    units = {
        name: [(i + rng.random()) / SETTINGS for i in rng.sample(range(SETTINGS), SETTINGS)]
        for name in SPACE
    }
    return [
        {name: _scaled(task, method, name, units[name][i]) for name in _names(method)}
        | ({} if method in FIRST_ORDER else {"T": PERIODS.get(task, T)})
        for i in range(SETTINGS)
    ]


def _names(method: str) -> list[str]:
    if method in FIRST_ORDER:
        return ["lr", "weight_decay"]
    names = list(SPACE)
    return names[:-1] if method in ("KFAC", "IKFAC") else names


def _scaled(task: str, method: str, name: str, unit: float) -> float:
    low, high = SPACE[name]
    if name == "alpha1":
        return round(low + unit * (high - low), 3)
    if name == "lr":
        low, high = RATES.get(method, (low, high))
        factor = 1.0 if method == "AdamW" else LARGER.get(task, 1.0)
        low, high = low * factor, high * factor
    return float(f"{low * (high / low) ** unit:.3g}")


# ---- what is wanted -----------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What is wanted, and what of it is known from the runs that were made.

    Attributes:
        store: The runs that were made.
        tasks: To run.
        methods: To run.
        steps: At most so many for each run; None for the task's own.
    """

    store: Store
    tasks: Sequence[str] = (*PRECISION, *SEARCHED)
    methods: Sequence[str] = tuple(METHODS)
    steps: int | None = None

    def run(self, task: str, method: str, seed: int, settings: dict[str, Any], **given: Any) -> Run:
        """A run, shortened where that is wanted."""
        steps = min(PAPER_TASKS[task].steps, self.steps or PAPER_TASKS[task].steps)
        return make(task, method, seed, settings, steps=steps, **given)

    def choice(self, task: str, method: str) -> list[Run]:
        """The runs that choose the settings of the two precisions."""
        grid = {"AdamW": ADAMW_GRID, "default": [{}]}.get(method, GRID)
        method = "KFAC" if method == "IKFAC" else method
        return [self.run(task, method, SEARCH, settings, checks=0) for settings in grid]

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of a random search."""
        found = drawn(task, method)
        return [self.run(task, method, SEARCH, settings, checks=0) for settings in found]

    def best(self, runs: Sequence[Run]) -> dict[str, Any] | None:
        """The settings that are best in validation, once all were tried."""
        results = [self.store.get(run) for run in runs]
        if None in results:
            return None
        metric = PAPER_TASKS[runs[0].task].higher_is_better

        def rank(i: int) -> tuple[float, float]:
            result = results[i]
            loss, value = (result.validation if result else None) or (None, None)
            loss = math.inf if loss is None else loss
            return (-(value or 0.0), loss) if metric else (loss, 0.0)

        chosen: dict[str, Any] = json.loads(runs[min(range(len(runs)), key=rank)].settings)
        return chosen

    def precise(self, task: str, method: str, dtype: str, **changed: Any) -> list[Run]:
        """The seeds of the best settings of the small grid, once known, some of them changed."""
        best = self.best(self.choice(task, method))
        if best is None:
            return []
        given: dict[str, Any] = {"dtype": dtype, "watch": method in OURS}
        return [self.run(task, method, seed, best | changed, **given) for seed in SEEDS]

    def confirmed(self, task: str, method: str, dtype: str) -> list[Run]:
        """The seeds of the best settings of the search, once they are known."""
        best = self.best(self.search(task, method))
        return [] if best is None else [self.run(task, method, s, best, dtype=dtype) for s in SEEDS]

    # ---- the order of runs ----------------------------------------------------------------------

    def wanted(self) -> Iterator[Run]:
        """All runs that are known by now, in the order in which they are made."""
        shown = [method for method in SHOWN if method in self.methods]
        for task in (task for task in PRECISION if task in self.tasks):
            yield from self._each(shown, self.choice, task)
            for dtype in ("float32", "bfloat16"):
                yield from self._each(shown, self.precise, task, dtype)
        for task in (task for task in PRECISION if task in self.tasks):
            for dtype in ("float32", "bfloat16"):
                for method, changed in self.looks:
                    yield from self.precise(task, method, dtype, **changed)
        searched = [task for task in (*SEARCHED, LARGE) if task in self.tasks]
        for task in searched:
            yield from self._each(self.methods, self.search, task)
            yield from self._each(self.methods, self.confirmed, task, "float32")
        for task in searched:
            yield from self._each(self.methods, self.confirmed, task, "bfloat16")

    @property
    def looks(self) -> list[tuple[str, dict[str, Any]]]:
        """The looks at methods that are to run."""
        return [(method, changed) for method, changed in LOOKS if method in self.methods]

    @staticmethod
    def _each(
        methods: Sequence[str], runs: Callable[..., list[Run]], task: str, *more: str
    ) -> Iterator[Run]:
        for method in methods:
            yield from runs(task, method, *more)

    def pending(self) -> list[Run]:
        """What can run now and is not made, in order."""
        wanted = dict.fromkeys(self.wanted())
        return [
            run
            for run in wanted
            if self.store.get(run) is None and PAPER_TASKS[run.task].missing is None
        ]

    def total(self) -> int:
        """How many runs the whole has, those that are not known yet with them."""
        shown = [method for method in SHOWN if method in self.methods]
        found = 0
        for task in dict.fromkeys(self.tasks):
            if task in PRECISION:
                found += len({run for m in shown for run in self.choice(task, m)})
                found += (len(shown) + len(self.looks)) * 2 * len(SEEDS)
            if task in (*SEARCHED, LARGE):
                found += self.searching(task)
        return found

    def searching(self, task: str) -> int:
        """How many runs the search on a task has."""
        return sum(len(drawn(task, method)) + 2 * len(SEEDS) for method in self.methods)

    def seconds(self) -> tuple[float, float]:
        """Processor seconds of the steps that were made, and of the whole, as far as known."""
        made = [result.seconds for _, result in self.store]
        mean = statistics.fmean(made) if made else math.nan
        return sum(made), sum(made) + mean * (self.total() - len(made))
