"""The measured rows of bench.py, and the files they are kept in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimizers import ENTRIES
from problems import PROBLEMS


@dataclasses.dataclass(frozen=True)
class Kind:
    """Medians of steps that refresh, or of steps that do not.

    Attributes:
        taken: How many steps they are of.
        forward_backward: Seconds of forward and backward, hooks included.
        step: Seconds of `step()`.
        whole: Seconds of all.
        calls: Aten calls of the hooks and of `step()`.
    """

    taken: int
    forward_backward: float
    step: float
    whole: float
    calls: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one optimizer with one T costs on one network.

    Attributes:
        problem: The network's name.
        optimizer: The optimizer's name.
        T: Steps between two refreshes; 1 where there are none.
        refresh: Of the steps that refresh, or None.
        other: Of the others, or None.
        state: Bytes kept between steps besides parameters and batch.
        peak: The most bytes allocated during a step.
        sgd: The steps of SGD in the same run.
        environment: The machine and torch's version.
    """

    problem: str
    optimizer: str
    T: int
    refresh: Kind | None
    other: Kind | None
    state: int
    peak: int
    sgd: Kind
    environment: str

    @property
    def device(self) -> str:
        """The machine, as the file is named after it."""
        return "cpu" if "thread" in self.environment else "cuda"

    def _mean(self, values: Any) -> float:
        """The mean over a period of what steps of either kind take."""
        if self.refresh is None or self.other is None:
            return values(self.refresh or self.other)
        share = ENTRIES[self.optimizer].share_of(self.T)
        return share * values(self.refresh) + (1.0 - share) * values(self.other)

    @property
    def ratio(self) -> float:
        """A whole step over SGD's."""
        return self._mean(lambda kind: kind.whole) / self.sgd.whole

    @property
    def own(self) -> float:
        """What the optimizer adds to a plain forward and backward, over a step of SGD."""
        return self.ratio - self.sgd.forward_backward / self.sgd.whole

    def brief(self) -> str:
        """One line for a terminal."""
        kinds = [
            f"{name} {1e3 * kind.forward_backward:.2f} + {1e3 * kind.step:.2f} ms, "
            f"{kind.calls} calls"
            for name, kind in (("refresh", self.refresh), ("other", self.other))
            if kind is not None
        ]
        return (
            f"{self.problem:5} {self.optimizer:24} T={self.T:<3} {self.ratio:6.2f} x SGD  "
            f"own {self.own:6.2f}  state {self.state / 2**20:8.2f} MiB  "
            f"peak {self.peak / 2**20:8.2f} MiB  {';  '.join(kinds)}"
        )


def save(rows: Iterable[Row], folder: Path) -> None:
    """Keep rows in place of earlier rows of the same network, device, optimizer and T."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = folder / f"steps-{row.device}-{row.problem}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[f"{row.optimizer}, T={row.T}"] = dataclasses.asdict(row)
        path.write_text(json.dumps(kept, indent=1) + "\n")


def load(folder: Path) -> list[Row]:
    """All rows that are kept, in the order of the lists of networks and optimizers."""
    rows = [
        Row(**entry | {k: entry[k] and Kind(**entry[k]) for k in ("refresh", "other", "sgd")})
        for path in folder.glob("steps-*.json")
        for entry in json.loads(path.read_text()).values()
    ]
    problems, optimizers = list(PROBLEMS), list(ENTRIES)
    return sorted(
        (row for row in rows if row.problem in PROBLEMS and row.optimizer in ENTRIES),
        key=lambda row: (
            row.device,
            problems.index(row.problem),
            optimizers.index(row.optimizer),
            row.T,
        ),
    )
