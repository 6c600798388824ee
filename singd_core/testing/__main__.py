"""`python -m singd_core.testing package.module:Name`: which laws a structure keeps."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from singd_core.structures import Structure, get
from singd_core.testing.report import check_structure


def find(name: str) -> type[Structure]:
    """The structure of `package.module:Name`, or of a registered name like `hierarchical:2,2`."""
    module, _, attribute = name.partition(":")
    if not attribute or all(part.strip().isdigit() for part in attribute.split(",")):
        return get(name)
    found = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Structure)):
        raise ValueError(f'"{name}": {module} has no structure called {attribute}')
    return found


def sides(text: str) -> list[int]:
    """The sides of `1,2,7`."""
    found = [int(d) for d in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("a side is at least 1")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each structure; 1 if one breaks a law, 2 if there is no such structure."""
    parser = argparse.ArgumentParser("python -m singd_core.testing", description=__doc__)
    parser.add_argument("structure", nargs="+", help="package.module:Name, or a registered name")
    parser.add_argument("--sizes", type=sides, help="sides of the matrices, such as 1,2,7")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        structures = [find(name) for name in given.structure]
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    failed = False
    for S in structures:
        report = check_structure(S, sizes=given.sizes, raises=False)
        print(report, end="\n\n")  # noqa: T201
        failed = failed or bool(report.errors)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
