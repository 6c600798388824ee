"""Settings of parameter groups that a script changes between steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from singd_core import rules
from singd_core._recipes import SWITCHES
from singd_core._settings import plain
from singd_torch._groups import (
    NOTES,
    check_counts,
    check_group,
    check_keys,
    readable,
    settings_of,
)

# What layers were found with, and what their state has the form of.
_FIXED = (
    "rule",
    "structures",
    "average_groups",
    "preconditioner_dtype",
    "momentum_dtype",
    "normalized",
)
# What is no setting, or counted.
_OTHERS = {"params", "param_names", "steps", "largest_lr", NOTES}
_GONE = object()


class Known:
    """The settings that groups had when they were last checked."""

    def __init__(self, groups: Sequence[dict[str, Any]] = (), names: Iterable[str] = ()) -> None:
        """`names` are the names of settings; groups may have other keys as well."""
        self._groups, self._names = list(groups), set(names)
        self._keys = [_said(group) for group in groups]
        self._of = [
            {name: value for name, value in group.items() if name not in _OTHERS}
            for group in groups
        ]

    def has(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the groups themselves, none left out and none a copy."""
        pairs = zip(groups, self._groups, strict=False)
        return len(groups) == len(self._groups) and all(a is b for a, b in pairs)

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check what was changed since.

        Raises:
            ValueError: Naming the group, the setting, its value and what it may be.
        """
        same = self.has(groups)
        for i, group in enumerate(groups):
            known = self._of[i] if same else self._of_copied(group)
            keys = self._keys[i] if same else _said(known) | _OTHERS
            try:
                _check(group, known, anew=not same)
            except KeyError as error:
                raise ValueError(
                    f"parameter group {i} has no {error}: optimizer.add_param_group fills in what "
                    "is not given, and a copy of a group has all that the group has"
                ) from None
            except ValueError as error:
                raise ValueError(f"parameter group {i}: {error}") from None
            if group.keys() != keys:
                check_keys({key: group[key] for key in group.keys() - keys}, self._names)
                keys |= _said(group)

    def _of_copied(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of the group that had the first parameter of this one, if one had it."""
        for known, settings in zip(self._groups, self._of, strict=True):
            if known is group or any(p is q for q in known["params"] for p in group["params"][:1]):
                return settings
        return {}


def _said(group: dict[str, Any]) -> set[str]:
    """The keys of a group, without switches that are off, which may be turned on."""
    return {key for key, value in group.items() if key not in SWITCHES or value}


def _check(group: dict[str, Any], known: dict[str, Any], *, anew: bool) -> None:
    now = [(name, readable(group.get(name, _GONE))) for name in known]
    changed = [name for name, value in now if value is not known[name]]  # what is read always is
    group |= {name: plain(group[name]) for name in changed if name in group}
    if anew or (changed and not (changed == ["lr"] and _is_rate(readable(group["lr"])))):
        _refuse_others(group, known)
        check_group(group)
    check_counts(group)
    known.update((name, group[name]) for name in changed if name in group)


def _is_rate(lr: Any) -> bool:
    """Whether a rate is what schedules make, so that no group is checked in each step."""
    return type(lr) is float and 0.0 <= lr < math.inf


def _refuse_others(group: dict[str, Any], known: dict[str, Any]) -> None:
    changed = [name for name in _FIXED if name in known and group[name] != known[name]]
    if "alpha1" in known and not changed:
        keeps = rules.get(group["rule"]).keeps_momentum
        now, before = (settings_of(group | {"alpha1": own["alpha1"]}) for own in (group, known))
        if keeps(now) and not keeps(before):  # the factors have no momenta
            changed.append("alpha1")
    for name in changed:
        raise ValueError(
            f"{name}={group[name]!r}: was {known[name]!r} when the layers were found, and cannot "
            "be changed later: build another optimizer"
        )
