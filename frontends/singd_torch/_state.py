"""The state as flat tensors under stable names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import is_half
from singd_core._layer_state import LayerState, begun, no_cost
from singd_core._settings import Settings
from singd_core.late import Late
from singd_core.rules import Factors
from singd_torch import _fallback
from singd_torch._groups import NOTES, settings_of
from singd_torch.layers.layer import Layer

MOMENTUM = "momentum_buffer"
LATE = "late."
COMPENSATION = "compensation"


def before(
    layer: Layer, s: Settings, factors: Factors | None = None, device: torch.device | None = None
) -> LayerState:
    """The state of a layer before its first step, with its own factors or others.

    It is on the device of the weight, or on another, such as `meta`.
    """
    device = device or layer.weight.device
    likes = [
        torch.empty((), dtype=p.dtype, device=device).expand(p.shape) for p in layer.parameters
    ]
    factors, dtype = factors or layer.first_factors(device), layer.group["momentum_dtype"]
    return begun(factors, likes, layer.shape[0], s, dtype)


def factors_of(layer: Layer, state: Mapping[Any, Mapping[str, Any]]) -> Factors:
    """The factors that the state has of a layer, else the first; on its device, in its dtypes."""
    template, kept = layer.first_factors(torch.device("meta")), state.get(layer.weight, {})
    arrays, device = dict(template.named_arrays()), layer.weight.device
    if not all(name in kept for name in arrays):
        return layer.first_factors()
    return template.rebuild(kept[name].to(device, a.dtype) for name, a in arrays.items())


def no_late(layer: Layer, like: Tensor) -> Late:
    """Sums over no gradients yet, of each matrix or of it and its bias, on the device of `like`."""
    return Late.zeros(layer.shape[0], like, with_bias=layer.bias_is_apart)


def late_of(layer: Layer, state: Mapping[Any, Mapping[str, Any]]) -> Late:
    """The sums over late gradients that the state has of a layer, else zeros."""
    zero, kept = no_late(layer, layer.weight), state.get(layer.weight, {})
    return zero.rebuild(kept.get(name, a).to(a) for name, a in zero.named_arrays(LATE))


def moving(state: LayerState) -> list[dict[str, Tensor]]:
    """What is kept beside the factors, of the weight and of the bias, if it is of the layer."""
    kept = [{MOMENTUM: momentum} for momentum in state.momenta or ()]
    if state.late is not None:
        kept[0] |= state.late.named_arrays(LATE)
    return kept


def begin_cost(
    p: nn.Parameter, s: Settings, state: MutableMapping[Any, dict[str, Tensor]]
) -> Tensor | None:
    """What rounding has cost a parameter, nothing at first; None unless that is kept."""
    cost: Tensor | None = state.get(p, {}).get(COMPENSATION)
    if cost is None:
        cost = no_cost(p.detach(), s)
    elif s.rounding == "kahan" and is_half(p):
        cost = cost.to(p)  # the same unless the model was moved or cast
    else:
        return None
    if cost is not None:
        state.setdefault(p, {})[COMPENSATION] = cost
    return cost


def before_any_step(
    layers: Iterable[Layer],
    fallback: Mapping[nn.Parameter, dict[str, Any]],
) -> dict[Tensor, dict[str, Tensor]]:
    """The state that the first steps would make, in memory of its own that can be loaded into.

    `fallback` has the groups of the other parameters.
    """
    state: dict[Tensor, dict[str, Tensor]] = {}
    for layer in layers:
        s = settings_of(layer.group)
        factors = layer.first_factors().map(torch.clone)
        state[layer.weight] = dict(factors.named_arrays())
        kept = moving(before(layer, s, factors))
        for p, own in zip(layer.parameters, kept, strict=bool(kept)):
            state.setdefault(p, {}).update(own)
        for p in layer.parameters:
            begin_cost(p, s, state)
    for p, group in fallback.items():
        state[p] = _fallback.initial(p, on_device=p.device.type != "cpu")
        begin_cost(p, settings_of(group), state)
    return state


def portable(state_dict: dict[str, Any], notes: str) -> dict[str, Any]:
    """A state dict of tensors and plain values alone: structures by name, without functions.

    It has an entry for each parameter, empty if nothing is kept for it, as for the bias of a layer:
    torch.distributed.checkpoint takes one that is absent for one that was lost. All groups have the
    `notes` of all parameters.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    indices = [index for group in groups for index in group["params"]]
    state = {index: {} for index in indices} | state_dict["state"]
    for group in groups:
        group["structures"] = structure_names(group["structures"])
        group[NOTES] = notes
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
