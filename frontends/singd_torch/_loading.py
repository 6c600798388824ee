"""A saved state, which is checked as a whole before anything is changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from singd_core._recipes import with_rule
from singd_core._warnings import warn
from singd_core.rules import Factors, learns_from_gradients
from singd_core.rules.centering import InputMean
from singd_core.structures.choose import is_by_cost
from singd_torch import _fallback, _state
from singd_torch._form import check_form, notes_of, without_notes
from singd_torch._groups import (
    DTYPES,
    check_counts,
    check_group,
    noted,
    plain_name,
    settings_of,
)
from singd_torch._warnings import listed
from singd_torch.layers.layer import Layer
from singd_torch.layers.matrices import find_all

Entries = dict[str, Any]

# How entries begin that count, or that squares are summed up in; but one is a logarithm.
_SQUARES = "exp_avg_sq", "step", "averages.", _state.LATE, "levels."
_GROWTH = _state.LATE + "growth"
_OTHERS = (
    "it was saved with another structure, recipe or model, or one of both optimizers was given the "
    "model and the other one parameters alone; load what was saved in the same way, or begin with "
    "a new state and keep the weights"
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What an optimizer goes on from.

    Attributes:
        groups: The saved groups, with what was left out of them.
        entries: The state of each parameter.
        factors: The factors of each layer by its weight, None where none were saved.
        others: Entries of the saved state that belong to no parameter.
        notes: What was found out about parameters.
        lost: Of a model in parts, weights of layers with rows that were never seen.
        refreshes: Of a model in parts, how many refreshes the factors of weights have had.
    """

    groups: list[dict[str, Any]]
    entries: dict[nn.Parameter, Entries]
    factors: dict[nn.Parameter, Factors | None]
    others: dict[Any, Any]
    notes: dict[Any, dict[str, Any]]
    lost: Collection[nn.Parameter] = ()
    refreshes: Mapping[Any, int] = dataclasses.field(default_factory=dict)


def loaded(
    model: nn.Module,
    live: Sequence[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    state_dict: Mapping[str, Any],
) -> Loaded:
    """A saved state for the parameters of the live groups, in the dtypes it was saved in.

    Raises:
        ValueError: Naming the first setting or entry that is wrong, is missing or does not fit.
    """
    check_form(state_dict)
    groups = completed(state_dict["param_groups"], live)
    entries = _by_parameter(state_dict["state"], groups, live)
    known = {index for group in groups for index in group["params"]}
    factors = {}
    own = [g | {"params": mine["params"]} for g, mine in zip(groups, live, strict=True)]
    notes = saved_notes(state_dict["param_groups"], live, names)
    whole, begun = noted(notes, "without_rows"), list[str]()
    for layer in find_all(model, own, notes):
        if layer.weight not in whole:
            begin_anew(layer, entries)
        by_cost = is_by_cost(layer.group["structures"])
        if by_cost and _drop_other_structures(layer, entries[layer.weight]):
            begun.append(layer.name)
        factors[layer.weight] = checked(layer, entries)
    for p, found in entries.items():
        check_moments(names.get(p, "a parameter"), p, found)
        check_cost(names.get(p, "a parameter"), p, found)
    if begun:
        warn(
            f"the factors of {listed(begun)} begin anew: the checkpoint has factors of other "
            "structures, which were chosen for another use of the weights or by another version"
        )
    others = {key: value for key, value in state_dict["state"].items() if key not in known}
    return Loaded(groups, entries, factors, others, notes)


def is_absent(value: Any) -> bool:
    """Whether a saved value stands for none: torch's, where a flat checkpoint has nothing."""
    return isinstance(value, Mapping)


def checked(layer: Layer, entries: Mapping[nn.Parameter, Entries]) -> Factors | None:
    """The saved factors of a layer, None if it had none yet. All that is kept of it is checked.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    _check_momenta(layer, entries)
    return saved_factors(layer, entries[layer.weight])


def saved_factors(layer: Layer, entries: Mapping[str, Any]) -> Factors | None:
    """The saved factors of a layer, None if it had none yet.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    if not any("." in name and not name.startswith(_state.LATE) for name in entries):
        return None
    template = layer.first_factors(torch.device("meta"))
    arrays = dict(template.named_arrays())
    _check(layer.name, arrays, entries)
    known, by_rows = (bool(entries[f"averages.{name}"].any()) for name in ("k", "t_U"))
    if learns_from_gradients(settings_of(layer.group)) and known and not by_rows:
        own = dataclasses.replace(layer, by_gradient=True)
        template = own.first_factors(torch.device("meta"))
    return template.rebuild(entries[name] for name in arrays)


def begin_anew(layer: Layer, entries: Mapping[nn.Parameter, Entries]) -> None:
    """Begin anew with what a layer keeps now and did not keep yet.

    A weight without rows whose bias has a name now keeps its factors, and the mean of its inputs
    begins; if AdamW trained a matrix of one input, all begins anew. Factors of rows that learn from
    gradients now keep no averages, and begin anew if they have a bias as a column.
    """
    own = entries[layer.weight]
    k = own.get("averages.k")
    # else AdamW trains the weight until its rows are seen
    if k is None and "exp_avg" in own and learns_from_gradients(settings_of(layer.group)):
        for p in layer.parameters:
            entries[p].clear()
        return
    k = k if isinstance(k, Tensor) and not isinstance(k, DTensor) else None
    t_U, K = own.get("averages.t_U"), own.get("K.diag")
    by_rows = not layer.kind.has_rows and isinstance(t_U, Tensor) and bool(t_U.any())
    is_apart = layer.bias_is_apart and "inputs.mean" not in own
    if k is not None and by_rows and layer.bias is None:
        for name in [name for name in own if name.startswith("averages.")]:
            own[name] = torch.zeros_like(own[name])
    if layer.bias is not None and is_apart and k is not None:
        (batch, _, d_in), like = layer.shape, k.reshape(-1)
        has_column = isinstance(K, Tensor) and K.shape[-1:] == (d_in + 1,)
        if has_column:
            for name in [name for name in own if "." in name]:
                del own[name]
        else:
            own.update(InputMean.zeros(batch, d_in, like).named_arrays("inputs."))
            entries[layer.bias].clear()
            if _state.MOMENTUM in own:
                zeros = torch.zeros_like(layer.bias, dtype=own[_state.MOMENTUM].dtype)
                entries[layer.bias][_state.MOMENTUM] = zeros
        if _state.MOMENTUM in own:
            own.update(_state.no_late(layer, like).named_arrays(_state.LATE))


def _drop_other_structures(layer: Layer, entries: Entries) -> bool:
    """Drop the saved factors of a layer that have its sides in other structures than it has now.

    Returns:
        Whether there were any.
    """
    template = layer.first_factors(torch.device("meta"))
    shapes = {name: tuple(a.shape) for name, a in template.named_arrays()}
    saved = {name: a for name, a in entries.items() if name[:2] in ("K.", "C.")}
    if any(not isinstance(a, Tensor) or isinstance(a, DTensor) for a in saved.values()):
        return False
    if all(shapes.get(name) == tuple(a.shape) for name, a in saved.items()):
        return False
    sides = sorted(L.shape[-1] for L in template.sides)  # calls may be of the transpose now
    if any(side not in sides for side in _sides(saved, len(layer.shape[0]), shapes)):
        return False
    for name in [n for n in entries if "." in n and not n.startswith(_state.LATE)]:
        del entries[name]
    return True


def _sides(
    saved: Mapping[str, Tensor], batch: int, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[int]:
    """The sides of saved factors, each of one structure; 0 of what is the factor of none.

    What the live layer has too, and is there beside another structure, is left out: torch fills it
    in where it was not saved.
    """
    for side in "KC":
        own = {name: a for name, a in saved.items() if name[0] == side}
        others = {name: a for name, a in own.items() if name not in shapes}
        yield sum(_length(tuple(a.shape)[batch:]) for a in (others or own).values())


def _length(shape: Sequence[int]) -> int:
    """How many rows of a factor an array has: a diagonal, a square matrix, or square blocks."""
    if len(shape) == 1 or (shape and shape[-1:] == shape[-2:-1]):
        return shape[-1] * math.prod(shape[:-2])
    return 0


def _check_momenta(layer: Layer, entries: Mapping[nn.Parameter, Entries]) -> None:
    """Check the momenta of a layer and its sums over late gradients: all are there or none.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    s = dataclasses.replace(settings_of(layer.group), momentum=0.5)  # with any
    needed = _state.moving(_state.before(layer, s, device=torch.device("meta")))
    kept = [entries[p] for p in layer.parameters]
    if any(key in own for own, keys in zip(kept, needed, strict=True) for key in keys):
        parts = (layer.name, f"the bias of {layer.name}")
        for name, template, own in zip(parts, needed, kept, strict=False):
            _check(name, template, own)


def check_moments(name: str, p: nn.Parameter, entries: Entries) -> None:
    """Check what AdamW keeps of a parameter: all is there or nothing.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    template = _fallback.initial(nn.Parameter(p.to("meta")), on_device=False)
    if not entries.keys() & template.keys():
        return
    if isinstance(entries.get("step"), (int, float)):
        entries["step"] = torch.tensor(float(entries["step"]), device="cpu")
    _check(name, template, entries)
    entries["step"] = entries["step"].float()  # whoever casts a whole checkpoint casts the count


def check_cost(name: str, p: Tensor, entries: Entries) -> None:
    """Check what rounding has cost a parameter, if that is there.

    Raises:
        ValueError: If it does not fit.
    """
    if _state.COMPENSATION in entries:
        _check(name, {_state.COMPENSATION: p}, entries)


def _check(name: str, template: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Check that saved entries can take the places of a template's.

    Raises:
        ValueError: Naming the first entry that is missing or does not fit.
    """
    for key, like in template.items():
        if key not in entries:
            raise ValueError(
                f"the checkpoint has no {key!r} for {name!r}, it has {sorted(entries)}: {_OTHERS}"
            )
        saved = entries[key]
        if not isinstance(saved, Tensor):
            raise ValueError(f"{key!r} of {name!r} is {saved!r} in the checkpoint, not a tensor")
        if isinstance(saved, DTensor):
            raise ValueError(
                f"{key!r} of {name!r} is one process's part in the checkpoint: save with dcp.save, "
                "or what get_state_dict returns with StateDictOptions(full_state_dict=True)"
            )
        if saved.shape != like.shape:
            raise ValueError(
                f"{key!r} of {name!r} has shape {tuple(saved.shape)} in the checkpoint, "
                f"but {tuple(like.shape)} is needed: {_OTHERS}"
            )
        if not (saved.is_complex() if like.is_complex() else saved.dtype in DTYPES):
            raise ValueError(
                f"{key!r} of {name!r} is of {saved.dtype} in the checkpoint, "
                f"but {like.dtype} or another of its kind is needed"
            )
        if not torch.isfinite(saved).all():
            raise ValueError(f"{key!r} of {name!r} is not finite in the checkpoint")
        counts = key.startswith(_SQUARES) and key != _GROWTH
        if counts and (_fallback.real(saved) < 0.0).any():
            raise ValueError(f"{key!r} of {name!r} is below 0 in the checkpoint")


# ---- the groups --------------------------------------------------------------------------------


def completed(
    saved: Sequence[Mapping[str, Any]], live: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Saved groups with what `_state.portable` left out taken from the live ones.

    Raises:
        ValueError: If the groups do not fit, have a wrong setting or are of another optimizer.
    """
    groups = [with_rule(without_notes(group)) for group in saved]
    sizes = [[len(group["params"]) for group in several] for several in (groups, live)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the parameter groups have {sizes[0]} parameters in the checkpoint, here {sizes[1]}"
        )
    for i, (group, own) in enumerate(zip(groups, live, strict=True)):
        if "structures" not in group:
            raise ValueError(
                "the checkpoint is of another optimizer: it has no 'structures'; begin with a new "
                "state, the weights can stay"
            )
        if group.get("lr_cov") is None:
            group["lr_cov"] = own["lr_cov"]
        group["largest_lr"] = _number(group.get("largest_lr", 0.0))  # not that of other steps
        for name, value in own.items():  # settings that are younger than the checkpoint
            group.setdefault(name, value)
        if group["structures"] == _state.structure_names(own["structures"]):
            group["structures"] = own["structures"]
        try:
            check_group(group)
            check_counts(group)
        except ValueError as error:
            raise ValueError(f"parameter group {i} of the checkpoint: {error}") from None
    return groups


def saved_notes(
    saved: Sequence[Mapping[str, Any]],
    live: Sequence[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
) -> dict[Any, dict[str, Any]]:
    """What saved groups note of the parameters of the live ones.

    Names tell which are meant, or else places: models may have been renamed, or share names.
    """
    params, notes = [p for group in live for p in group["params"]], dict[Any, dict[str, Any]]()
    by_name = {plain_name(names[p]): p for p in params if p in names}
    by_place = {i: name for group in saved for i, name, _ in notes_of(group)}
    are_told = len(by_name) == len(params) and len(set(by_place.values())) == len(by_place)
    are_told = are_told and by_name.keys() >= set(by_place.values())
    for group in saved:
        for place, name, found in notes_of(group):
            if are_told or place < len(params):
                notes[by_name[name] if are_told else params[place]] = dict(found)
    return notes


def _number(value: Any) -> Any:
    """The number that a tensor holds; what is none stays as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _by_parameter(
    state: Mapping[Any, Any], groups: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]
) -> dict[nn.Parameter, Entries]:
    """The saved entries of each parameter, copied to its device in the dtype they were saved in."""
    entries = {}
    for group, own in zip(groups, live, strict=True):
        for index, p in zip(group["params"], own["params"], strict=True):
            entries[p] = {
                name: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state.get(index, {}).items()
                if not is_absent(value)
            }
    return entries
