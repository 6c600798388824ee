"""How a mistake is planted: a structure with one, and the law that a person would expect."""

from collections.abc import Callable
from typing import Any, NamedTuple

from singd_core.structures import Structure, blockdiagonal, hierarchical


class Bug(NamedTuple):
    """A structure, the law expected, and the array libraries in which it shows."""

    structure: type[Structure]
    law: str
    backends: tuple[str, ...]


BUGS: list[Bug] = []


def bug(law: str, *backends: str) -> Callable[[type[Structure]], type[Structure]]:
    def add(cls: type[Structure]) -> type[Structure]:
        BUGS.append(Bug(cls, law, backends or ("numpy",)))
        return cls

    return add


def library(x: Any) -> str:
    return type(x).__module__.split(".")[0]


Blocks: Any = blockdiagonal(2)
Hierarchical: Any = hierarchical(2, 2)
