"""The methods of the paper, as settings of this library, and the first-order methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from singd_torch import SINGD

# "SINGD" of the paper is the general update with a structure other than dense; INGD has that.
PAPER = {"recipe": "paper", "T": 5}
STRUCTURES = {
    "SINGD diagonal": "diagonal",
    "SINGD block": "blockdiagonal:30",
    "SINGD hierarchical": "hierarchical:15,15",
    "SINGD rank": "triubottomrightdiag:15",
    "SINGD Toeplitz": "triltoeplitz",
}
OURS: dict[str, dict[str, Any]] = {
    "KFAC": PAPER | {"rule": "kfac"},
    "IKFAC": PAPER | {"rule": "ikfac"},
    "INGD": PAPER | {"structures": ("dense", "dense")},
    **{name: PAPER | {"structures": (s, s)} for name, s in STRUCTURES.items()},
    "default": {},
}
FIRST_ORDER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
METHODS = [*FIRST_ORDER, *OURS]


def build(method: str, model: nn.Module, loss_average: str, **given: Any) -> torch.optim.Optimizer:
    """The optimizer of a method with some settings."""
    if method in FIRST_ORDER:
        return FIRST_ORDER[method](model.parameters(), **given)
    return SINGD(model, loss_average=loss_average, **OURS[method] | given)
