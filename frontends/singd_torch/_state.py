"""The state as flat tensors under stable names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd_core import rules
from singd_core._settings import Settings
from singd_core.rules import Factors
from singd_core.step import Late
from singd_torch import _fallback
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer

MOMENTUM = "momentum_buffer"
LATE = "late."


def initial(layer: Layer, s: Settings) -> Factors:
    """The factors of a layer before the first refresh, on the device of its weight."""
    device = layer.weight.device
    like_K, like_C = (torch.empty(0, dtype=dtype, device=device) for dtype in layer.dtypes[:2])
    has_rows, one_hot = layer.has_rows, layer.one_hot
    return rules.start(
        layer.structures, layer.shape, s, like_K, like_C, has_rows=has_rows, one_hot=one_hot
    )


def no_momenta(layer: Layer) -> list[Tensor]:
    """The momenta of a layer's parameters before its first step."""
    dtype = layer.dtypes[2]
    return [
        torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        for p in layer.parameters
    ]


def no_late(layer: Layer) -> Late:
    """The sums over late gradients of a layer before its first step."""
    return Late.zeros(layer.shape[0], layer.weight)


def late_of(layer: Layer, state: Mapping[Any, Mapping[str, Any]]) -> Late:
    """The sums over late gradients that the state has of a layer."""
    zero, kept = no_late(layer), state.get(layer.weight, {})
    return zero.rebuild(kept.get(name, a).to(a) for name, a in zero.named_arrays(LATE))


def before_any_step(
    layers: Iterable[Layer], fallback: Iterable[nn.Parameter]
) -> dict[Tensor, dict[str, Tensor]]:
    """The state that the first steps would make, in memory of its own that can be loaded into."""
    state: dict[Tensor, dict[str, Tensor]] = {}
    for layer in layers:
        s = settings_of(layer.group)
        layer.factors = initial(layer, s).map(torch.clone)
        state[layer.weight] = dict(layer.factors.named_arrays())
        if s.momentum != 0.0:
            for p, momentum in zip(layer.parameters, no_momenta(layer), strict=True):
                state.setdefault(p, {})[MOMENTUM] = momentum
            if s.normalized:
                state[layer.weight].update(no_late(layer).named_arrays(LATE))
    for p in fallback:
        state[p] = _fallback.initial(p, on_device=p.device.type != "cpu")
    return state


def moved(layer: Layer, s: Settings) -> Factors:
    """The factors of a layer on the device of its weight, in its dtypes, and of its rule."""
    template = initial(layer, s)
    assert layer.factors is not None
    pairs = zip(layer.factors.named_arrays(), template.named_arrays(), strict=True)
    return template.rebuild(own.to(new.device, new.dtype) for (_, own), (_, new) in pairs)


def portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of tensors and plain values alone: structures by name, without functions.

    It has an entry for each parameter, empty if nothing is kept for it, as for the bias of a layer:
    torch.distributed.checkpoint takes one that is absent for one that was lost.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    indices = [index for group in groups for index in group["params"]]
    state = {index: {} for index in indices} | state_dict["state"]
    for group in groups:
        group["structures"] = structure_names(group["structures"])
        if callable(group["lr_cov"]):
            group["lr_cov"] = None
    return state_dict | {"state": state, "param_groups": groups}


def structure_names(structures: Any) -> Any:
    """Structures by name."""
    if structures is None or isinstance(structures, str):
        return structures
    if isinstance(structures, type):
        return structures.name  # type: ignore[attr-defined]
    return tuple(cls if isinstance(cls, str) else cls.name for cls in structures)
