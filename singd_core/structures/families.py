"""Structures with parameters: classes that a function makes."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from singd_core.structures.base import Structure


@cache
def family(
    factory: Callable[..., type[Structure]],
    parameters: tuple[int, ...],
    base: type[Structure],
    **attributes: Any,
) -> type[Any]:
    """The subclass of `base` with these class attributes that `factory(*parameters)` returns.

    A structure with parameters is a class that a function makes. The parameters are attributes of
    the class. Equal calls give the same class, with the name `factory:p1,p2`. It is pickled as a
    call of `factory`, so `factory` has to be a function of a module.

    Args:
        factory: The function that returns the class.
        parameters: Its arguments, integers.
        base: The structure whose methods read the attributes.
        **attributes: The attributes.

    Example:
        >>> from singd_core.structures import Diagonal
        >>> class Repeated(Diagonal):
        ...     times: int
        >>> def repeated(times):
        ...     return family(repeated, (times,), Repeated, times=times)
        >>> repeated(2).name, repeated(2).times, repeated(2) is repeated(2)
        ('repeated:2', 2, True)
    """
    name = f"{factory.__name__}:{','.join(map(str, parameters))}"
    title = base.__name__ + "_".join(map(str, parameters))
    return _Made(title, (base,), attributes | {"name": name, "made_by": (factory, parameters)})


def check_size(k: int, name: str) -> None:
    """Refuse a side of blocks that is none.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below 1.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__"):  # 2.0 would be cached in place of 2
        raise TypeError(f"{name} must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"{name} must be at least 1, got {k}")


class _Made(type):
    """The type of classes that a factory makes: `pickle` would look for them in their module."""


def _made_again(cls: _Made) -> Any:
    origin = cls.__dict__.get("made_by")  # a subclass has a name of its own
    return cls.__qualname__ if origin is None else origin


copyreg.pickle(_Made, _made_again)
