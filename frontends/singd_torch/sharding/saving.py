"""The state that is parted over processes, as DTensors that any number of processes can load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from singd_core.rules import Factors, learns_from_gradients
from singd_torch import _state
from singd_torch._form import check_form
from singd_torch._groups import noted, settings_of
from singd_torch._loading import (
    Entries,
    Loaded,
    begin_anew,
    check_cost,
    check_moments,
    checked,
    completed,
    is_absent,
    saved_notes,
)
from singd_torch.layers.layer import Layer
from singd_torch.layers.matrices import find_all
from singd_torch.sharding.box import rows
from singd_torch.sharding.boxes import local
from singd_torch.sharding.exchange import Exchange
from singd_torch.sharding.owners import Shares
from singd_torch.sharding.share import Share, slab_of, stand_ins

Key = tuple[nn.Parameter, str]


def saved(
    share: Share, owners: Mapping[nn.Parameter, int], stand_ins: Mapping[nn.Parameter, nn.Parameter]
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The state of each parameter, the same names in the same order on all processes.

    What one process has is made a DTensor, parted along its first axis over all of them.
    """
    group = share.processes
    rank = dist.get_rank(group)
    own = {p: share.state.get(stand_ins[p], {}) for p, owner in owners.items() if owner == rank}
    described = [
        {name: (tuple(t.shape), t.dtype) for name, t in own.get(p, {}).items()} for p in owners
    ]
    every = share.gathered(described)
    forms = {
        (p, name): form
        for i, (p, owner) in enumerate(owners.items())
        for name, form in every[owner][i].items()
    }
    found: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for p in owners}
    for (p, name), t in _parted(forms, own, owners, share).items():
        found[p][name] = t
    for p, part in stand_ins.items():
        if p not in owners:
            found[p] = {
                name: _copied(t, share) if "." in name else _like(p, t)
                for name, t in share.state.get(part, {}).items()
            }
    return found


def _copied(t: Tensor, share: Share) -> DTensor:
    """What all processes have, as a DTensor."""
    mesh = DeviceMesh.from_group(share.processes, share.device.type)
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False)


def _parted(
    forms: Mapping[Key, tuple[tuple[int, ...], torch.dtype]],
    own: Mapping[nn.Parameter, Mapping[str, Tensor]],
    owners: Mapping[nn.Parameter, int],
    share: Share,
) -> dict[Key, DTensor]:
    """Tensors that one process has whole each, of known shapes and dtypes, as DTensors."""
    if not forms:
        return {}
    group, device = share.processes, share.device
    places = {key: rows(shape, dist.get_world_size(group)) for key, (shape, _) in forms.items()}
    exchange = Exchange({key: owners[key[0]] for key in forms}, places, group)
    dtype = reduce(torch.promote_types, (dtype for _, dtype in forms.values()))
    given = [((p, name), own[p][name] if p in own else None) for p, name in forms]
    parts = exchange.to_all(
        [(key, None if t is None else t.to(device)) for key, t in given],
        torch.empty(0, dtype=dtype, device=device),
    )
    mesh = DeviceMesh.from_group(group, device.type)
    return {
        key: DTensor.from_local(
            part.to(dtype).clone(),
            mesh,
            [Shard(0) if shape and shape[0] else Replicate()],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
        for (key, (shape, dtype)), part in zip(forms.items(), parts, strict=True)
    }


def _like(p: nn.Parameter, t: Tensor) -> Tensor:
    """A moment as a DTensor like its parameter, in the memory that it has."""
    if not isinstance(p, DTensor) or t.ndim == 0:
        return t
    return DTensor.from_local(
        t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


# ---- loading ------------------------------------------------------------------------------------


def loaded(
    share: Share,
    shares: Callable[[Sequence[Layer]], Shares],
    model: nn.Module,
    live: Sequence[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    state_dict: Mapping[str, Any],
) -> Loaded:
    """What this process goes on from, of a state of any number of processes, or of one.

    It has the entries and factors of the layers that it owns, and parts of all others.

    Raises:
        ValueError: On all processes, naming the first setting or entry that does not fit.
    """
    check_form(state_dict)
    groups = completed(state_dict["param_groups"], live)
    _check_alike(groups, live, state_dict["state"], share)
    notes = saved_notes(state_dict["param_groups"], live, names)
    own_groups = [g | {"params": mine["params"]} for g, mine in zip(groups, live, strict=True)]
    layers = find_all(model, own_groups, notes)
    lost = set()
    refreshes, by_rows = _refreshes(_values(groups, live, state_dict["state"]))
    for layer in layers:
        if layer.kind.has_rows and learns_from_gradients(settings_of(layer.group)):
            layer.by_gradient = layer.weight in refreshes and layer.weight not in by_rows
            lost |= {layer.weight} if layer.by_gradient else set()
    parted = shares(layers)
    wanted = {p: parted.owners[one.weight] for one in parted.whole for p in one.parameters}
    weights = {layer.weight for layer in layers}
    rank = dist.get_rank(share.processes)
    entries: dict[nn.Parameter, Entries] = {}
    seen: set[nn.Parameter] = set()
    for p, name, value in _values(groups, live, state_dict["state"]):
        kept = entries.setdefault(p, {})
        of_factors = p in weights and "." in name
        if of_factors and not name.startswith(_state.LATE):
            seen.add(p)
        if p not in wanted and not of_factors:
            kept[name] = _part(p, name, value)
            continue
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if wanted.get(p, rank) == rank:
            is_tensor = isinstance(full, Tensor)  # what is none is an error to come
            kept[name] = full.detach().to(p.device, copy=True) if is_tensor else full
    mine = [(one, stand_ins([one])[0]) for one in parted.whole if wanted[one.weight] == rank]
    for layer in layers:
        if layer.weight in parted.parts:
            mine.append((layer, slab_of(layer, parted.parts[layer.weight][rank])))
    kept_whole = noted(notes, "without_rows")
    factors: dict[nn.Parameter, Factors | None] = dict.fromkeys(seen)

    def check() -> None:
        for layer, plain in mine:
            pairs = zip(layer.parameters, plain.parameters, strict=True)
            of_plain = {part: entries.setdefault(p, {}) for p, part in pairs}
            if layer.weight not in kept_whole:
                begin_anew(plain, of_plain)
            own = checked(plain, of_plain)
            if own is not None:
                factors[layer.weight] = own
        for p, kept in entries.items():
            like = torch.empty(p.shape, dtype=p.dtype, device="meta") if p in wanted else local(p)
            name = names.get(p, "a parameter")
            check_moments(name, nn.Parameter(like), kept)
            check_cost(name, like, kept)

    _all_or_none(check, share)
    known = {index for group in groups for index in group["params"]}
    others = {key: value for key, value in state_dict["state"].items() if key not in known}
    return Loaded(groups, entries, factors, others, notes, lost, refreshes)


def _refreshes(
    values: Iterable[tuple[nn.Parameter, str, Any]],
) -> tuple[dict[nn.Parameter, int], set[nn.Parameter]]:
    """How many refreshes the factors of weights have had, if any, and which of them had rows."""
    counts, by_rows = dict[nn.Parameter, int](), set[nn.Parameter]()
    for p, name, value in values:
        if name in ("averages.k", "averages.t_U") and isinstance(value, Tensor):
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if bool(full.any()):
                by_rows |= {p} if name == "averages.t_U" else set()
                counts |= {p: int(full.max())} if name == "averages.k" else {}
    return counts, by_rows


def _values(
    groups: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
) -> Iterator[tuple[nn.Parameter, str, Any]]:
    """All saved values, in an order that is the same on all processes."""
    for group, own in zip(groups, live, strict=True):
        for index, p in zip(group["params"], own["params"], strict=True):
            found = state.get(index, {})
            yield from ((p, name, x) for name, x in sorted(found.items()) if not is_absent(x))


def _part(p: nn.Parameter, name: str, value: Any) -> Any:
    """The part of a moment that belongs to the part of its parameter that is here."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(p, DTensor):
        return value.clone() if isinstance(value, Tensor) else value
    if value.shape != p.shape:
        return value  # which is an error to come
    mesh, places = p.device_mesh, p.placements
    if isinstance(value, DTensor) and (value.device_mesh, value.placements) != (mesh, places):
        value = value.full_tensor()
    if not isinstance(value, DTensor):
        value = distribute_tensor(value.to(p.device), mesh, places, src_data_rank=None)
    return value.to_local().detach().clone()


def _check_alike(
    groups: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    share: Share,
) -> None:
    """Refuse entries that not all processes have: one would wait for the others for ever.

    Raises:
        ValueError: On all processes.
    """
    mine = [(i, name) for i, (_, name, _) in enumerate(_values(groups, live, state))]
    found = share.gathered(mine)
    if any(one != found[0] for one in found):
        raise ValueError(
            "the state that is loaded has other entries on this process than on another: all "
            "processes load the same state, as torch.distributed.checkpoint has it"
        )


def _all_or_none(check: Callable[[], None], share: Share) -> None:
    """Run a check on all processes, and fail on all of them if it fails on one.

    Raises:
        ValueError: With the text of the first one's.
    """
    text = None
    try:
        check()
    except ValueError as error:
        text = str(error)
    failed = [text for text in share.gathered(text) if text is not None]
    if failed:
        raise ValueError(failed[0])
