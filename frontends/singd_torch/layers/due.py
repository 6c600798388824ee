"""Whether a step wants rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from singd_core import _settings
from singd_core._recipes import validate
from singd_core._settings import Settings, plain
from singd_torch.layers.layer import Layer


def is_due(layer: Layer) -> bool:
    """Whether rows of a layer are wanted in the current step."""
    return not layer.without_rows and may_be_due(layer)


def may_be_due(layer: Layer) -> bool:
    """Whether a step wants rows of a layer, unless this process has lost them by now."""
    return not layer.seen or is_refresh(layer.group)


def wants_proof(layer: Layer) -> bool:
    """Whether it is to be found out in this step if the rows of a layer tell its gradient.

    It is with the first rows, and after 1, 2, 4, 8, ... refreshes by rows. A run that goes on does
    the same, as its factors know their number.
    """
    return not layer.rows_seen or not layer.refreshes & (layer.refreshes - 1)


def is_refresh(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the factors that there are."""
    return _is_due(group["steps"], group["T"], group["growing_T"])


@lru_cache(maxsize=16, typed=True)  # a number of another kind is not found, but looked at
def _is_due(steps: int, T: int, growing_T: bool) -> bool:
    """The same for all layers; each is asked several times in a step."""
    s = Settings(T=plain(T), growing_T=growing_T)
    if type(T) is not int or T < 1:  # a script has changed it, and it is asked for before a step
        validate(s)
    if type(steps) is not int:
        raise ValueError(f"steps={steps!r}: must be an integer of at least 0")
    return bool(_settings.is_due(steps, s))
