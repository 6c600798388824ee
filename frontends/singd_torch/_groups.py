"""The settings of a parameter group."""

from __future__ import annotations

import dataclasses
from typing import Any

from singd_core import preconditioner
from singd_core._settings import Settings, validate
from singd_core.curvature.base import is_expand, loss_terms
from singd_torch import _fallback

_SETTINGS = tuple(f.name for f in dataclasses.fields(Settings))


def settings_of(group: dict[str, Any]) -> Settings:
    """The settings of a parameter group."""
    return Settings(**{name: group[name] for name in _SETTINGS})


def check_group(group: dict[str, Any]) -> None:
    """Check the settings of a group.

    Raises:
        ValueError: Naming the setting, its value and what it may be.
    """
    validate(settings_of(group))
    if group["structures"] != "auto" or group["kfac"]:
        preconditioner.resolve(group["structures"], kfac=group["kfac"])
    is_expand(group["kfac_approx"])
    loss_terms(group["loss_average"], 1, ())
    if len(group["preconditioner_dtype"]) != 2:
        raise ValueError("preconditioner_dtype: give two, those of K and of C")
    _fallback.check(group)
