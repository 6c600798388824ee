"""A wrong override of any method breaks a law, also one that is wrong only for some arrays."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from singd_core._tree import Tree
from singd_core.structures import Dense, Diagonal, Structure
from singd_core.testing import LawError, backends
from singd_core.testing.operations import SCALARS
from singd_core.testing.report import cases
from singd_core.testing.run import run

NUMPY = backends()[0]

# Methods whose results no law compares, and why.
WITHOUT_A_LAW = {
    "__repr__": "people read it",
    "__reduce__": "`pickle_round_trip` compares what becomes of it",
    "announce": "it is about all trees",
    "field_names": "the decorator writes it, and `declared` looks at it",
    "named_arrays": "its names are compared by `state_round_trip`",
    "has_side": "it says which sides the laws try",
}
OF_NO_ARRAYS = ("sums", "numbers", "width")


def overridable() -> list[str]:
    """The methods and properties of a structure, operators included."""
    kinds = (classmethod, staticmethod, property)
    return [
        name
        for name, value in {**vars(Tree), **vars(Structure)}.items()
        if (inspect.isfunction(value) or isinstance(value, kinds)) and name != "__init_subclass__"
    ]


METHODS = [name for name in overridable() if name not in WITHOUT_A_LAW]
OF_ARRAYS = [name for name in METHODS if name not in OF_NO_ARRAYS]


# ---- where a method is wrong, by the arguments of its call ---------------------------------------


def arrays(arguments: tuple[Any, ...]) -> list[np.ndarray]:
    """The arrays among arguments, those of structures included."""
    found: list[Any] = []
    for x in arguments:
        found += [a for _, a in Tree.named_arrays(x)] if isinstance(x, Structure) else [x]
    return [a for a in found if isinstance(a, np.ndarray)]


def everywhere(*arguments: Any) -> bool:
    return True


def nowhere(*arguments: Any) -> bool:
    return False


def of_a_stack(first: Any, *others: Any) -> bool:
    """Of a stack of diagonal matrices, or of matrices that a class method is given."""
    if isinstance(first, Structure):
        return arrays((first,))[0].ndim > 1
    return any(a.ndim > 2 for a in arrays(others)) or (2, 1) in others  # or of as many identities


def in_16_bits(*arguments: Any) -> bool:
    return any(a.dtype == np.float16 for a in arrays(arguments))


def of_a_number_in_an_array(L: Structure, c: Any, *others: Any) -> bool:
    return isinstance(c, np.ndarray)


# ---- the mistakes --------------------------------------------------------------------------------


def spoilt(x: Any) -> Any:
    """A wrong result in place of a right one."""
    if isinstance(x, Structure):
        return Tree.map(x, spoilt)
    if isinstance(x, tuple):
        return (*x, 1) if all(isinstance(n, int) for n in x) else tuple(map(spoilt, x))
    if isinstance(x, type):
        return Dense
    if x is None:
        return 1
    return -x if isinstance(x, int) else x + np.ones((), x.dtype)


def planted(name: str, where: Callable[..., bool]) -> type[Structure]:
    """`Diagonal` with a method that is wrong where it is said to be."""
    right = inspect.getattr_static(Diagonal, name)
    function = right.fget if isinstance(right, property) else getattr(right, "__func__", right)

    @functools.wraps(function)
    def wrong(*arguments: Any, **named: Any) -> Any:
        is_wrong = where(*arguments, *named.values())  # arguments may be overwritten
        result = function(*arguments, **named)
        return spoilt(result) if is_wrong else result

    method = type(right)(wrong) if isinstance(right, (classmethod, property)) else wrong
    S = type("Planted", (Diagonal,), {name: method, "__module__": __name__})
    globals()["Planted"] = S  # where pickle looks for it
    return S


def broken(S: type[Structure], dtype: str = "float64") -> str | None:
    """The first law that a structure breaks on NumPy in this dtype."""
    for law, backend, name in cases([NUMPY]):
        if name == dtype:
            once = dataclasses.replace(law, examples=1)
            try:
                run(once, S, backend, name, None if law.sizes else [3, 1])
            except LawError as error:
                return error.law
    return None


# ---- the promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_method_breaks_a_law(name: str) -> None:
    assert broken(planted(name, everywhere))


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_a_method_that_is_wrong_of_a_stack_breaks_a_law(name: str) -> None:
    assert broken(planted(name, of_a_stack))


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_a_method_that_is_wrong_in_16_bits_breaks_a_law(name: str) -> None:
    assert broken(planted(name, in_16_bits), "float16")


@pytest.mark.parametrize("name", SCALARS)
def test_a_method_that_is_wrong_of_a_number_in_an_array_breaks_a_law(name: str) -> None:
    assert broken(planted(name, of_a_number_in_an_array))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_a_right_method_breaks_none(dtype: str) -> None:
    assert broken(planted("apply", nowhere), dtype) is None


def test_methods_without_a_law_are_methods() -> None:
    assert set(WITHOUT_A_LAW) <= set(overridable())
