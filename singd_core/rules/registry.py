"""Names of rules: `get("ikfac")`, `register("mine", Mine)`, `names()`."""

from __future__ import annotations

from typing import Any

from singd_core.rules.base import Rule
from singd_core.rules.inverse_free import IKFAC, SINGD
from singd_core.rules.kfac import KFAC
from singd_core.structures.registry import runs_again

_RULES: dict[str, type[Rule]] = {"singd": SINGD, "ikfac": IKFAC, "kfac": KFAC}


def get(name: object) -> type[Rule]:
    """The rule of a name.

    Raises:
        ValueError: If there is no such name.
    """
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"rule={name!r}: there are {', '.join(map(repr, _RULES))}")
    return _RULES[name]


def register(name: str, rule: Any) -> None:
    """Add a rule under a name, for the setting `rule` of every frontend.

    A definition that runs again, as in a cell of a notebook, takes the place of the one before.

    Raises:
        ValueError: If the name is taken or empty.
        TypeError: If `rule` is no subclass of `Rule`, or leaves out its `title`, what is abstract
            or the decorator `rule`.
    """
    if not name or (name in _RULES and not runs_again(rule, _RULES[name])):
        raise ValueError(f"{name!r} cannot name a rule: it is empty or taken; there are {names()}")
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f"{rule!r} is no subclass of Rule")
    left_out = [*sorted(rule.__abstractmethods__), *["title"] * (not hasattr(rule, "title"))]
    if left_out:
        raise TypeError(f"{rule.__name__} leaves out {', '.join(left_out)}: write them")
    if not hasattr(rule, "__match_args__"):  # the names of its fields
        raise TypeError(f"{rule.__name__} has no fields: write @singd_core.rules.rule above it")
    _RULES[name] = rule


def names() -> list[str]:
    """All names."""
    return list(_RULES)
