"""Names of structures: `get("hierarchical:15,15")`, `register("mine", Mine)`, `names()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeAlias

from singd_core.structures.base import Structure
from singd_core.structures.blockdiagonal import blockdiagonal
from singd_core.structures.blocktriangular import (
    hierarchical,
    trilbottomrightdiag,
    triltopleftdiag,
    triubottomrightdiag,
    triutopleftdiag,
)
from singd_core.structures.dense import Dense, Tril, Triu
from singd_core.structures.diagonal import Diagonal
from singd_core.structures.toeplitz import TrilToeplitz, TriuToeplitz

Family: TypeAlias = type[Structure] | Callable[..., type[Structure]]

_FAMILIES: dict[str, Family] = {
    "dense": Dense,
    "diagonal": Diagonal,
    "blockdiagonal": blockdiagonal,
    "tril": Tril,
    "triu": Triu,
    "triltoeplitz": TrilToeplitz,
    "triutoeplitz": TriuToeplitz,
    "trilbottomrightdiag": trilbottomrightdiag,
    "triltopleftdiag": triltopleftdiag,
    "triubottomrightdiag": triubottomrightdiag,
    "triutopleftdiag": triutopleftdiag,
    "hierarchical": hierarchical,
    # the names of the authors' package
    "block30diagonal": blockdiagonal(30),
    "hierarchical15_15": hierarchical(15, 15),
}


def get(name: object) -> type[Structure]:
    """The structure of a name, which has parameters after a colon. Structures return unchanged.

    >>> get("blockdiagonal:4").numbers(10)
    36

    Raises:
        ValueError: If there is no such name, if the parameters do not fit it, or if the function
            that was registered makes no structure of them.
    """
    if isinstance(name, type) and issubclass(name, Structure):
        return name
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is neither a structure nor a name; there are {_known()}")
    family, _, text = name.partition(":")
    if family not in _FAMILIES:
        raise ValueError(f'there is no structure "{name}"; there are {_known()}')
    found = _FAMILIES[family]
    if isinstance(found, type):
        if text:
            raise ValueError(f'"{name}": {family} takes no parameters; there are {_known()}')
        return found
    try:
        parameters = [int(part) for part in text.split(",")] if text else []
        inspect.signature(found).bind(*parameters)
    except (TypeError, ValueError):
        raise ValueError(
            f'"{name}": expected "{_usage(family)}" with integers; there are {_known()}'
        ) from None
    try:
        made = found(*parameters)
    except ValueError as error:
        raise ValueError(f'"{name}": {error}; there are {_known()}') from None
    return checked(made, name, family)


def checked(made: object, name: str, function: str) -> type[Structure]:
    """What a function made for a name.

    Raises:
        ValueError: If it is no structure.
    """
    if isinstance(made, type) and issubclass(made, Structure):
        return made
    raise ValueError(f'"{name}": {function} returned {made!r}, which is no structure')


def register(name: str, structure: Family) -> None:
    """Add a structure under a name, for `get` and for the `structures=` of every frontend.

    A definition that runs again, as in a cell of a notebook, takes the place of the one before.

    Args:
        name: A new name without a colon.
        structure: A subclass of `Structure`, or a function of integers that makes one; its
            parameters are then given after a colon, as in `"name:2,3"`.

    Raises:
        ValueError: If the name is taken or holds a colon.
        TypeError: If `structure` is neither.
    """
    if ":" in name or not name:
        raise ValueError(f"{name!r} cannot name a structure: a name is not empty and has no colon")
    if name in _FAMILIES and not runs_again(structure, _FAMILIES[name]):
        raise ValueError(f'the name "{name}" is taken; there are {_known()}')
    if not (
        issubclass(structure, Structure) if isinstance(structure, type) else callable(structure)
    ):
        raise TypeError(
            f"{structure!r} is neither a subclass of Structure nor a function making one"
        )
    _FAMILIES[name] = structure


def runs_again(new: object, known: object) -> bool:
    """Whether both are of one definition in the source, which has run twice."""
    name = getattr(new, "__qualname__", "")
    if not name or "<lambda>" in name:  # such as of a partial function: it may be any other
        return False
    places = [(x.__module__, getattr(x, "__qualname__", "")) for x in (new, known)]
    return places[0] == places[1]


def names() -> list[str]:
    """All names, with their parameters; one in brackets may be left out."""
    return [_usage(family) for family in _FAMILIES]


def _usage(family: str) -> str:
    found = _FAMILIES[family]
    if isinstance(found, type):
        return family
    text = ""
    for i, p in enumerate(inspect.signature(found).parameters.values()):
        part = ("," if i else ":") + p.name
        text += part if p.default is inspect.Parameter.empty else f"[{part}]"
    return family + text


def _known() -> str:
    return ", ".join(names())
