"""The table of an optimizer's parameters, as every frontend prints it."""

from __future__ import annotations

from collections.abc import Sequence


def times(shape: Sequence[int]) -> str:
    """A shape as text, e.g. 3×2."""
    return "×".join(map(str, shape)) or "1"


def rendered(lines: Sequence[Sequence[str]], right: str) -> str:
    """The lines in aligned columns; the column with the title `right` to the right."""
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        columns.append([x.rjust(width) if column[0] == right else x.ljust(width) for x in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
