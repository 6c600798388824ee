"""The table that `print(optimizer)` shows: who owns each parameter, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from singd_core import rules
from singd_core._layer_state import LayerState, bytes_of
from singd_core._table import rendered, times
from singd_core.layers import Tensor
from singd_torch import _state
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer

_NO_PRODUCT = "no product with it was seen so far"
_BYTES, _WHY = "bytes of state", "why without rows"


def table(
    layers: Sequence[Layer],
    fallback: Mapping[nn.Parameter, dict[str, Any]],
    names: dict[nn.Parameter, str],
    reasons: Mapping[nn.Parameter, str] | None = None,
    owners: Mapping[nn.Parameter, int] | None = None,
) -> str:
    """A line for each layer and each other parameter: names, shape, rule, structures, bytes.

    `fallback` has the groups of the other parameters, `reasons` says of parameters without rows why
    none are taken, `owners` which process keeps and steps each layer: all of them do if it has
    none.
    """
    reasons = reasons or {}
    lines: list[tuple[str, ...]] = [("parameter", "shape", "rule", "K", "C", _BYTES)]
    why = [_WHY]
    for layer in layers:
        name = layer.name
        if layer.bias is not None:
            name += f" + {names.get(layer.bias, 'bias').rpartition('.')[2]}"
        rule = rules.get(layer.group["rule"]).title
        rule += "" if layer.expects_rows else " without rows"
        K, C = (cls.name for cls in layer.structures)
        lines.append((name, times(layer.weight.shape), rule, K, C, f"{layer_bytes(layer):,}"))
        unseen = "no call of its module was seen so far" if layer.has_modules else _NO_PRODUCT
        unseen = unseen if layer.by_gradient or layer.is_stack else ""
        reason = unseen if layer.is_stack else reasons.get(layer.weight, unseen)
        why.append("" if layer.expects_rows else reason)
    for p, group in fallback.items():
        name, size = names[p], fallback_bytes(p, group)
        lines.append((name, times(p.shape), "AdamW", "", "", f"{size:,}"))
        why.append(reasons.get(p, "") if Tensor.fits(p.shape) else "")
    if owners is not None:
        places = ["process", *(str(owners.get(layer.weight, "all")) for layer in layers)]
        places += ["its parts" for _ in fallback]
        lines = [(*line[:-1], place, line[-1]) for line, place in zip(lines, places, strict=True)]
    if any(why[1:]):
        lines = [(*line, reason) for line, reason in zip(lines, why, strict=True)]
    return rendered(lines, _BYTES)


def fallback_bytes(p: nn.Parameter, group: dict[str, Any]) -> int:
    """Bytes of state of a parameter that AdamW trains: two moments, and what rounding has cost."""
    like = nn.Parameter(torch.empty_like(p, device="meta"))
    (kept,) = _state.before_any_step([], {like: group}).values()
    return sum(t.nbytes for name, t in kept.items() if name != "step")


def layer_bytes(layer: Layer) -> int:
    """Bytes of state of one layer: factors with levels, momentum, and what rounding has cost."""
    return bytes_of(_before(layer))


def factor_bytes(layer: Layer) -> int:
    """Bytes of the factors of one layer, with levels."""
    return bytes_of(LayerState(_before(layer).factors, None))


def _before(layer: Layer) -> LayerState:
    return _state.before(layer, settings_of(layer.group), device=torch.device("meta"))
