"""Settings of parameter groups that a script changes between steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from singd_torch._groups import NOTES, check_group

# What layers were found with, and what their state has the form of.
_FIXED = "rule", "structures", "average_groups", "preconditioner_dtype", "momentum_dtype"
# What is no setting, or counted.
_OTHERS = {"params", "param_names", "steps", "largest_lr", *NOTES}


class Known:
    """The settings that groups had when they were last checked."""

    def __init__(self, groups: Iterable[dict[str, Any]] = ()) -> None:
        self._of = [
            {name: value for name, value in group.items() if name not in _OTHERS}
            for group in groups
        ]

    def check(self, groups: Iterable[dict[str, Any]]) -> None:
        """Check what was changed since.

        Raises:
            ValueError: Naming the group, the setting, its value and what it may be.
        """
        for i, (group, known) in enumerate(zip(groups, self._of, strict=False)):
            changed = [name for name, value in known.items() if group[name] is not value]
            if changed and not (changed == ["lr"] and _is_rate(group["lr"])):
                try:
                    _refuse_others(group, known)
                    check_group(group)
                except ValueError as error:
                    raise ValueError(f"parameter group {i}: {error}") from None
            known.update((name, group[name]) for name in changed)


def _is_rate(lr: Any) -> bool:
    """Whether a rate is what schedules make, so that no group is checked in each step."""
    return type(lr) is float and 0.0 <= lr < math.inf


def _refuse_others(group: dict[str, Any], known: dict[str, Any]) -> None:
    for name in _FIXED:
        if group[name] != known[name]:
            raise ValueError(
                f"{name}={group[name]!r} was {known[name]!r} when the layers were found, whose "
                "state has the form of that: build another optimizer"
            )
