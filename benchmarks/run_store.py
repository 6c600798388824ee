"""What is kept of runs: a file each, with the code and the packages that made it."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import platform
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pages import ROOT

SOURCES = (ROOT / "singd_core", ROOT / "frontends" / "singd_torch")
POINTS = 30  # of a curve

Run = TypeVar("Run", bound=Any)
Result = TypeVar("Result", bound=Any)


class Store(ABC, Generic[Run, Result]):
    """All runs that were made and what they ended with, one file each, which is a run's `path`."""

    FOLDER: ClassVar[Path]

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or self.FOLDER
        paths = sorted(self.folder.glob("*/*.json"))
        self.results = dict(self.read(json.loads(path.read_text())) for path in paths)

    def __iter__(self) -> Iterator[tuple[Run, Result]]:
        return iter(self.results.items())

    def get(self, run: Run) -> Result | None:
        """What is kept of a run, of whatever code."""
        return self.results.get(run)

    def loss(self, run: Run) -> float | None:
        """The final loss of a run, if it was made."""
        found = self.get(run)
        return None if found is None else found.loss

    def add(self, run: Run, result: Result) -> None:
        """Keep a run; its file is there as a whole or not at all."""
        self.results.pop(run, None)  # the key that stays would be the old one
        self.results[run] = result
        path = self.folder / run.path
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.write(run, result)) + "\n")
        new.replace(path)

    @abstractmethod
    def write(self, run: Run, result: Result) -> dict[str, Any]:
        """The content of a file."""

    @abstractmethod
    def read(self, data: dict[str, Any]) -> tuple[Run, Result]:
        """The run of a file with this content."""


def trained(
    train: Callable[[Run], Result], todo: Sequence[Run], workers: int
) -> Iterator[tuple[Run, Result]]:
    """Runs and their results, from processes of one thread each, or with 0 from this one."""
    one = functools.partial(_on_one_thread, train)
    if workers == 0:
        yield from map(one, todo)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(one, todo)


def _on_one_thread(train: Callable[[Run], Result], run: Run) -> tuple[Run, Result]:
    torch.set_num_threads(1)
    return run, train(run)


def key_of(named: dict[str, Any]) -> str:
    """Eight letters for what decides a run."""
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]


def thinned(losses: list[float]) -> list[tuple[int, float]]:
    """At most 30 points: the last step of each stretch and the mean of its finite losses."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    size = max(-(-len(finite) // POINTS), 1)
    starts = range(0, len(finite), size)
    stretches = [finite[i : i + size] for i in starts]
    return [(i + len(s), statistics.fmean(s)) for i, s in zip(starts, stretches, strict=True)]


def versions(method: str) -> dict[str, str]:
    """What may change the numbers a little."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    found["machine"] = platform.machine()
    if method in ("PSGD", "SOAP"):
        found["pytorch-optimizer"] = importlib.metadata.version("pytorch-optimizer")
    return found


# ---- the code that made a run -------------------------------------------------------------------


def fingerprint(sources: tuple[Path, ...] = SOURCES) -> str:
    """Of SINGD's code: another one for other code, the same for other comments or docstrings."""
    found = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")):
            name = path.relative_to(source).as_posix()
            if not name.startswith("testing/"):
                found.update(f"{source.name}/{name}:{_said(ast.parse(path.read_text()))}".encode())
    return found.hexdigest()[:12]


def _said(node: Any) -> str:
    """A syntax tree in letters that are the same in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_said, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and _is_text(body[0]):
        fields["body"] = body[1:]
    said = (f"{name}={_said(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(node).__name__}({','.join(said)})"


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


CODE = fingerprint()  # as it was imported, whatever becomes of the files
