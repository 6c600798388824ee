"""What the optimizer does in numbers: computed when asked for, read from the device in one go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from singd_core._array import widen
from singd_core._settings import is_bound
from singd_torch._groups import settings_of
from singd_torch.step.stack import Stack


def read(stacks: Iterable[Stack]) -> dict[str, float]:
    """The quantities of each layer, by `name of the weight/quantity`."""
    names, values = [], []
    for stack in stacks:
        if stack.factors is not None:
            for quantity, each in _quantities(stack).items():
                for layer, value in zip(stack.layers, stack.split(each), strict=True):
                    names.append(f"{layer.name}/{quantity}")
                    values.append(value.max().float())
    if not values:
        return {}
    joined = torch.stack([value.to(values[0].device) for value in values])
    return dict(zip(names, joined.tolist(), strict=True))


def _as(like: Tensor, value: Any) -> Tensor:
    """A value of each matrix, or a number for all of them, in the shape of `like`."""
    found = torch.as_tensor(value).to(like)
    return found.expand(like.shape) if found.ndim == 0 else found


def _quantities(stack: Stack) -> dict[str, Tensor]:
    factors, report = stack.factors, stack.report or {}
    assert factors is not None
    s = settings_of(stack.layers[0].group)
    like = factors.averages.k
    found = factors.norms() | {k: _as(like, v) for k, v in report.items()}
    t = factors.averages
    for name, t_U, damping in zip("KC", (t.t_U, t.t_G), t.damping(s), strict=True):
        if name == "C" or factors.has_rows:  # else t_U is not known
            found[f"{name}_damping"] = damping / (damping + t_U)
        if f"{name}_step" in report and is_bound(s.factor_bound):
            found[f"{name}_bounded"] = report[f"{name}_step"] > s.factor_bound
    if "update" in report:
        weight = stack.layers[0].kind.matrix(*stack.joined(lambda p: p))
        found["update"] = report["update"] / torch.linalg.vector_norm(widen(weight), dim=(-2, -1))
    return found
