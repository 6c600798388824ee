"""Dataclasses of arrays: named, mapped and rebuilt as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from singd_core._array import Array

T = TypeVar("T")
T_Tree = TypeVar("T_Tree", bound="Tree")

# Exactly these: NumPy's float64 scalars, which are floats too, are 0-d arrays.
_STATIC = {int, float, type(None)}


class Tree:
    """A frozen dataclass of arrays, trees, dictionaries of such, and plain numbers or None.

    `classes` lists all subclasses and `listeners` are called with each new one, so that a frontend
    can register every tree, also a user's, with its own tree library (see `announce`).
    """

    classes: ClassVar[list[type[Tree]]] = []
    listeners: ClassVar[list[Callable[[type[Tree]], None]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Announce the class."""
        super().__init_subclass__(**kwargs)
        Tree.classes.append(cls)
        for listener in Tree.listeners:
            listener(cls)

    @staticmethod
    def announce(listener: Callable[[type[Tree]], None]) -> None:
        """Call `listener` with every tree there is and will be, once each."""
        if listener not in Tree.listeners:
            Tree.listeners.append(listener)
            for cls in Tree.classes:
                listener(cls)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields, in the order of the constructor."""
        # torch.compile cannot trace dataclasses.fields of a class
        names: tuple[str, ...] = getattr(cls, "__match_args__")  # noqa: B009
        return names

    def named_arrays(self, prefix: str = "") -> Iterator[tuple[str, Array]]:
        """The arrays with their names, nested ones' as `outer.inner`."""
        for name in self.field_names():
            yield from _named(prefix + name, getattr(self, name))

    def map(self, function: Callable[..., Array], *others: Self) -> Self:
        """The tree of `function(array, *arrays of the others)`; other values stay as they are."""
        return type(self)(
            *[
                _mapped(function, getattr(self, name), [getattr(other, name) for other in others])
                for name in self.field_names()
            ]
        )

    def rebuild(self, arrays: Iterable[Array]) -> Self:
        """The same tree with other arrays, in the order of `named_arrays`."""
        new = iter(arrays)
        return self.map(lambda _: next(new))


def each(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """The same trees, tuples, lists and numbers, with each array replaced."""
    if isinstance(value, Tree):
        return value.map(function, *others)
    if isinstance(value, (tuple, list)):
        return type(value)(each(function, *parts) for parts in zip(value, *others, strict=True))
    return function(value, *others) if hasattr(value, "dtype") else value


def _named(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(value, Tree):
        yield from value.named_arrays(name + ".")
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _named(f"{name}.{key}", entry)
    elif type(value) not in _STATIC:
        yield name, value


def _mapped(function: Callable[..., Array], value: Any, others: list[Any]) -> Any:
    if isinstance(value, Tree):
        return value.map(function, *others)
    if isinstance(value, dict):
        return {k: _mapped(function, v, [o[k] for o in others]) for k, v in value.items()}
    return value if type(value) in _STATIC else function(value, *others)


@dataclass_transform(frozen_default=True, eq_default=False)
def tree(cls: type[T]) -> type[T]:
    """Make a frozen dataclass, compared and hashed by identity: arrays have no truth value."""
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
