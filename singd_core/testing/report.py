"""`check_structure`: all laws of a structure, on all array libraries, with a report to read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from singd_core.structures.base import Structure
from singd_core.structures.registry import get
from singd_core.testing.backends import Backend, backends
from singd_core.testing.law import LAWS, Law, LawError, label
from singd_core.testing.laws_storage import dense_operations
from singd_core.testing.run import run

_SHORT = {"float64": "64", "float32": "32", "bfloat16": "b16", "float16": "16"}


@dataclass
class Report:
    """Which laws a structure keeps, on which array library and in which dtype.

    Attributes:
        structure: The structure.
        results: For each law, backend and dtype that was tried, the error or None.
        seconds: The time it took.
        untried: How many cases there was no time for.
        missed: The laws of which there was no time for any case.
        elsewhere: The laws about array libraries that were not asked for, or are not installed.
        dense: The inherited operations that form d × d matrices though few numbers are stored.
    """

    structure: type[Structure]
    results: dict[tuple[str, str, str], LawError | None] = field(default_factory=dict)
    seconds: float = 0.0
    untried: int = 0
    missed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[LawError]:
        """The errors, the one to look at first in front."""
        return [error for error in self.results.values() if error is not None]

    @property
    def broken(self) -> list[str]:
        """The names of the laws that do not hold."""
        return list(dict.fromkeys(error.law for error in self.errors))

    def __repr__(self) -> str:
        columns = list(dict.fromkeys((b, t) for _, b, t in self.results))
        laws = [name for name in LAWS if any(law == name for law, _, _ in self.results)]
        width = max(map(len, laws), default=0)
        # a group of columns for each array library, of at least its name's width
        lines = ["", ""]
        rows = {law: f"{law:{width}}" for law in laws}
        for backend in dict.fromkeys(b for b, _ in columns):
            group = [t for b, t in columns if b == backend]
            room = max(len(backend), 4 * len(group) - 1)
            lines[0] += f"  {backend:{room}}"
            lines[1] += "  " + f"{' '.join(f'{_SHORT[t]:>3}' for t in group):{room}}"
            for law in laws:
                marks = " ".join(f"{self._mark(law, backend, t):>3}" for t in group)
                rows[law] += f"  {marks:{room}}"
        lines = [" " * width + line for line in lines] + list(rows.values())
        lines = [line.rstrip() for line in lines]
        counterexample = [f"\n{self.errors[0]}\n"] if self.errors else []
        return "\n".join([self.summary, *counterexample, *lines, *self._notes()])

    def _mark(self, law: str, backend: str, dtype: str) -> str:
        if (law, backend, dtype) not in self.results:
            return ""
        return "✓" if self.results[law, backend, dtype] is None else "✗"

    @property
    def summary(self) -> str:
        """One line: how many laws hold."""
        tried, name = len({law for law, _, _ in self.results}), label(self.structure)
        verdict = f"{name} keeps all laws"
        laws, cases = f"{tried} laws", f"{len(self.results)} cases"
        if self.broken:
            verdict = f"{name} breaks {', '.join(self.broken)}"
        elif self.untried:
            verdict = f"{verdict} that were tried" if tried else f"no law of {name} was tried"
            laws = f"{tried} of {tried + len(self.missed)} laws"
            cases = f"{len(self.results)} of {len(self.results) + self.untried} cases"
        return f"{verdict} ({laws}, {cases}, {self.seconds:.1f} s)"

    def _notes(self) -> Iterator[str]:
        if self.errors:
            _, backend, dtype = next(reversed(self.results))
            yield f"nothing was tried after {backend} in {dtype}, where a law is broken"
        if self.untried:
            yield f"there was no time for {self.untried} cases, the last of this order"
        if self.missed:
            yield f"there was no time for any case of {', '.join(self.missed)}"
        if self.elsewhere:
            yield f"not tried, as they are about other array libraries: {', '.join(self.elsewhere)}"
        if self.dense:
            yield (
                f"inherited, and so forming d × d matrices: {', '.join(self.dense)}; "
                "override them to be fast"
            )
        yield "blank: the law is not about that library or dtype, or checked there only nightly"


def cases(chosen: Sequence[Backend] | None = None) -> Iterator[tuple[Law, Backend, str]]:
    """Every law with every backend and dtype it speaks of, in the order that explains most.

    NumPy in float64 comes first, since a wrong equation is wrong everywhere. Laws of arrays come
    before laws of numbers, since an array in a wrong dtype or place spoils the numbers.
    """
    laws = sorted(LAWS.values(), key=lambda law: not law.guard)
    for backend in chosen or backends():
        for dtype in backend.dtypes:
            for law in laws:
                if law.speaks_of(backend.name, dtype):
                    yield law, backend, dtype


def check_structure(
    S: type[Structure] | str,
    *,
    sizes: Sequence[int] | None = None,
    backends: Sequence[Backend] | None = None,
    seconds: float | None = None,
    raises: bool = True,
) -> Report:
    """Check every law of a structure, on every array library that is installed, in every dtype.

    Laws whose outcome cannot differ with the library or dtype are checked in fewer of them, unless
    `SINGD_LAWS=nightly` is set. It stops after the first library and dtype with a broken law. The
    report says what was not tried.

    >>> from singd_core.structures import Diagonal
    >>> check_structure(Diagonal, sizes=[1, 2], backends=backends()[:1]).broken
    []

    Args:
        S: The structure, or its registered name.
        sizes: Sides of the matrices to try, in place of 1, 2, 3, 5, 8 and those that the parameters
            of a factory suggest: some should be smaller than its blocks, and no multiple of them.
        backends: The array libraries, in place of all.
        seconds: Try no new case after so many seconds; None is no limit. They are counted from when
            the array libraries are imported. NumPy comes first and takes some seconds, jax and
            torch.compile come last and take most of the time.
        raises: Whether a broken law is raised, or only reported.

    Raises:
        ValueError: If there is no such structure, or it has no matrices of a side in `sizes`, or
            these are not whole numbers of at least 1.
        LawError: Naming the law, the array library, the dtype and the side, with the smallest
            counterexample found.
    """
    structure, asked = get(S), list(cases(backends))
    report, start, place = Report(structure), time.perf_counter(), None
    for law, backend, dtype in asked:
        if report.errors and (backend.name, dtype) != place:
            break
        if seconds is not None and time.perf_counter() - start > seconds:
            report.untried += 1
            continue
        place = backend.name, dtype
        error, first = None, not report.errors
        try:  # only the first counterexample is made small: the report shows no other
            run(law, structure, backend, dtype, None if law.sizes else sizes, shrink=first)
        except LawError as broken:
            error = broken
        report.results[law.name, backend.name, dtype] = error
    report.seconds = time.perf_counter() - start
    if report.errors and raises:
        others = report.broken[1:]
        error = report.errors[0]
        if others:
            error.add_note(f"Broken as well: {', '.join(others)}.")
        raise error
    names = {law.name for law, _, _ in asked}
    report.elsewhere = [name for name in LAWS if name not in names]
    if not report.errors:
        tried = {name for name, _, _ in report.results}
        report.missed = [name for name in LAWS if name in names - tried]
        report.dense = dense_operations(structure)
    return report
