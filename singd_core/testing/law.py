"""What a law is, and the error that names a broken one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from singd_core.structures.base import Structure
from singd_core.testing.draw import Case


def nightly() -> bool:
    """Whether the laws run with many more examples: SINGD_LAWS=nightly in the environment."""
    return os.environ.get("SINGD_LAWS", "") == "nightly"


def label(S: type[Structure]) -> str:
    """What to call a structure: its class, or the factory with its parameters."""
    return S.name if S.made_by else S.__name__


class LawError(AssertionError):
    """A structure breaks a law; the message names both and shows the smallest case found.

    Attributes:
        law: The name of the law.
        structure: The structure.
        backend: The name of the array library.
        dtype: The name of the dtype.
        d: The side of the matrices.
    """

    law: str
    structure: type[Structure]
    backend: str
    dtype: str
    d: int


@dataclass(frozen=True)
class Law:
    """A promise that a structure keeps.

    Attributes:
        name: Its name: the name of the function that checks it.
        promise: One sentence, the first line of that function's docstring.
        check: Raises if the promise is broken in a case.
        backends: The array libraries in which it says something; empty for all.
        dtypes: The dtypes in which it says something; empty for all.
        guard: It speaks of arrays and not of numbers, so it goes first where numbers went wrong.
        sizes: The sides to try; None lets the structure decide.
        examples: Draws for each side, the first of zeros; 1 for a law that any numbers can check.
        floats: Also drawn with float data.
    """

    name: str
    promise: str
    check: Callable[[Case], None]
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    guard: bool = False
    sizes: tuple[int, ...] | None = None
    examples: int = 4
    floats: bool = True

    def speaks_of(self, backend: str, dtype: str) -> bool:
        """Whether the law says something about a backend (with or without device) and a dtype.

        jax compiles every operation for each shape and dtype, and array-api-strict computes with
        NumPy: there laws of single operations are checked in float32. In jax the law of `jit`
        compares all operations in every dtype.
        """
        general = not (self.backends or self.dtypes or self.guard)
        narrow = backend.partition(":")[0] in ("jax", "strict")
        if narrow and dtype != "float32" and general and not nightly():
            return False
        of_backend = not self.backends or backend in self.backends
        of_backend = of_backend or backend.partition(":")[0] in self.backends
        return of_backend and (not self.dtypes or dtype in self.dtypes)


LAWS: dict[str, Law] = {}


def law(
    *,
    backends: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    guard: bool = False,
    sizes: tuple[int, ...] | None = None,
    examples: int = 4,
    floats: bool = True,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Make a function of a case a law, in the order of definition."""

    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        promise = (check.__doc__ or "").strip().split("\n")[0]
        LAWS[check.__name__] = Law(
            check.__name__, promise, check, backends, dtypes, guard, sizes, examples, floats
        )
        return check

    return add
