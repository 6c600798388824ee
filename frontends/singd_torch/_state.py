"""The state as flat tensors under stable names, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd_core import preconditioner
from singd_core._settings import Settings
from singd_core.preconditioner import Factors
from singd_core.step import Late
from singd_torch import _fallback
from singd_torch._groups import settings_of
from singd_torch._layers import Layer

MOMENTUM = "momentum_buffer"
LATE = "late."


def initial(layer: Layer, s: Settings) -> Factors:
    """The factors of a layer before the first refresh, on the device of its weight."""
    device = layer.weight.device
    like_K, like_C = (torch.empty(0, dtype=dtype, device=device) for dtype in layer.dtypes[:2])
    return preconditioner.init(layer.structures, layer.shape, s, like_K, like_C)


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
    """The factors of a layer on the device of its weight, in the dtypes that go with it."""
    template = dict(initial(layer, s).named_arrays())
    assert layer.factors is not None
    return layer.factors.rebuild(
        array.to(template[name].device, template[name].dtype)
        for name, array in layer.factors.named_arrays()
    )


def restored(template: Factors, saved: Mapping[str, Tensor], name: str) -> Factors:
    """The factors with the saved tensors.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    arrays = []
    for key, array in template.named_arrays():
        if key not in saved:
            raise ValueError(
                f"the checkpoint has no {key!r} for {name!r}: it was saved with another structure, "
                f"recipe or model (it has {sorted(saved)})"
            )
        if saved[key].shape != array.shape:
            raise ValueError(
                f"{key!r} of {name!r} has shape {tuple(saved[key].shape)} in the checkpoint, "
                f"but {tuple(array.shape)} is needed"
            )
        arrays.append(saved[key])
    return template.rebuild(arrays)


def portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of tensors and plain values alone: structures by name, without functions.

    It has an entry for each parameter, empty if nothing is kept for it, as for the bias of a layer:
    torch.distributed.checkpoint takes one that is absent for one that was lost.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    indices = [index for group in groups for index in group["params"]]
    state = {index: state_dict["state"].get(index, {}) for index in indices}
    for group in groups:
        group["structures"] = _names(group["structures"])
        if callable(group["lr_cov"]):
            group["lr_cov"] = None
    return state_dict | {"state": state, "param_groups": groups}


def completed(state_dict: Mapping[str, Any], live: list[dict[str, Any]]) -> dict[str, Any]:
    """A saved state dict with what `portable` left out taken from the live groups.

    Raises:
        ValueError: If the groups do not fit, or are those of another optimizer.
    """
    saved = [dict(group) for group in state_dict["param_groups"]]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, live)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the parameter groups have {sizes[0]} parameters in the checkpoint, here {sizes[1]}"
        )
    for group, own in zip(saved, live, strict=True):
        if "structures" not in group:
            raise ValueError("the checkpoint is of another optimizer: it has no 'structures'")
        if group.get("lr_cov") is None:
            group["lr_cov"] = own["lr_cov"]
        for name, value in own.items():  # settings that are younger than the checkpoint
            group.setdefault(name, value)
        for name in set(group) - set(own):  # or that no longer are
            del group[name]
        if group["structures"] == _names(own["structures"]):
            group["structures"] = own["structures"]
    return dict(state_dict) | {"param_groups": saved}


def by_parameter(
    saved: Mapping[str, Any], live: list[dict[str, Any]]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The saved entries of each parameter, copied to its device in the dtype they were saved in.

    Raises:
        ValueError: If a moment does not have its parameter's shape.
    """
    entries = {}
    for group, own in zip(saved["param_groups"], live, strict=True):
        for index, p in zip(group["params"], own["params"], strict=True):
            found = saved["state"].get(index, {})
            if "exp_avg" in found and found["exp_avg"].shape != p.shape:
                raise ValueError(
                    f"parameter {index} has a moment of shape {tuple(found['exp_avg'].shape)} in "
                    f"the checkpoint, but is of shape {tuple(p.shape)}"
                )
            entries[p] = {
                name: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in found.items()
            }
    return entries


def upgrade(layer: Layer, entries: dict[nn.Parameter, dict[str, Any]], *, normalized: bool) -> None:
    """Turn what versions before 0.1 saved of a layer into what is kept now.

    The momentum was that of the matrix with its bias, and of natural gradients: a rule that
    averages gradients begins anew with it.
    """
    own = entries[layer.weight]
    momentum, (batch, d_out, d_in) = own.get(MOMENTUM), layer.shape
    if momentum is None or momentum.shape != (*batch, d_out, d_in):
        return
    if normalized:
        del own[MOMENTUM]
        return
    for p, part in zip(layer.parameters, layer.split(momentum), strict=True):
        entries[p][MOMENTUM] = part.contiguous()


def checked(layer: Layer, entries: Mapping[str, Tensor], s: Settings) -> Factors | None:
    """The saved factors of a layer, None if it had none yet.

    Raises:
        ValueError: Naming the first entry that does not fit.
    """
    if not any("." in name for name in entries):
        return None
    momentum = entries.get(MOMENTUM)
    if momentum is not None and momentum.shape != layer.weight.shape:
        raise ValueError(
            f"{MOMENTUM!r} of {layer.name!r} has shape {tuple(momentum.shape)} in the checkpoint, "
            f"but {tuple(layer.weight.shape)} is needed"
        )
    return restored(initial(layer, s), entries, layer.name)


def _names(structures: Any) -> Any:
    if structures is None or isinstance(structures, str):
        return structures
    return tuple(cls if isinstance(cls, str) else cls.name for cls in structures)
