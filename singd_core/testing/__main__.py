"""`python -m singd_core.testing package.module:Name`: which laws a structure keeps."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from singd_core.structures import Structure, get
from singd_core.structures.registry import checked
from singd_core.testing.backends import Backend, backends
from singd_core.testing.report import check_structure


def find(name: str) -> type[Structure]:
    """The structure of a name.

    Args:
        name: `package.module:Name` of a structure, `package.module:factory:2,3` of a function of
            integers that makes one, or a registered name like `hierarchical:2,3`.

    Raises:
        ImportError: If there is no such module.
        ValueError: If there is no such structure in it, or the integers do not fit.
    """
    module, _, rest = name.partition(":")
    attribute, colon, numbers = rest.partition(":")
    if not attribute or _integers(attribute) is not None:
        return get(name)
    found = getattr(importlib.import_module(module), attribute, None)
    if isinstance(found, type) and issubclass(found, Structure) and not colon:
        return found
    parameters = _integers(numbers) if colon else []
    if found is None or isinstance(found, type) or not callable(found) or parameters is None:
        raise ValueError(
            f'"{name}": {module} has no structure called {attribute}, and no function of that name '
            "that makes one of integers"
        )
    try:
        made = found(*parameters)
    except TypeError as error:
        raise ValueError(f'"{name}": {error}') from None
    return checked(made, name, attribute)


def _integers(text: str) -> list[int] | None:
    """The integers of `2,3`, or None."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdigit() for part in parts) else None


def sides(text: str) -> list[int]:
    """The sides of `1,2,7`."""
    found = [int(d) for d in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("a side is at least 1")
    return found


def libraries(text: str) -> list[Backend]:
    """The array libraries of `numpy,torch`."""
    known = {b.name: b for b in backends()}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each structure.

    Returns:
        0 if all keep all laws, 1 if one breaks a law, 2 if there is no such structure, 3 if there
        was no time for any case of some law.
    """
    parser = argparse.ArgumentParser("python -m singd_core.testing", description=__doc__)
    parser.add_argument(
        "structure",
        nargs="+",
        help="package.module:Name, package.module:factory:2,3, or a registered name",
    )
    parser.add_argument("--sizes", type=sides, help="sides of the matrices, such as 1,2,7")
    parser.add_argument("--backends", type=libraries, help="array libraries, such as numpy,torch")
    parser.add_argument("--seconds", type=float, help="try nothing new after so many seconds")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        structures = [find(name) for name in given.structure]
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    broken, missed = False, 0
    for S in structures:
        try:
            report = check_structure(
                S,
                sizes=given.sizes,
                backends=given.backends,
                seconds=given.seconds,
                raises=False,
            )
        except ValueError as error:
            print(error, file=sys.stderr)  # noqa: T201
            return 2
        print(report, end="\n\n")  # noqa: T201
        broken, missed = broken or bool(report.errors), missed + len(report.missed)
    if missed and not broken:
        print(  # noqa: T201
            f"no time was left for {missed} of the laws: give more --seconds, or fewer --backends",
            file=sys.stderr,
        )
    return 1 if broken else 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
