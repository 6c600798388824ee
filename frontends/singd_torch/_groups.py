"""The settings of a parameter group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from singd_core import _settings, rules
from singd_core._given import check_pair
from singd_core._recipes import SWITCHES, check_rate, hint, validate
from singd_core._scalars import number
from singd_core._settings import Settings, StepSettings
from singd_core._warnings import warn
from singd_core.layers.base import is_expand, loss_terms
from singd_core.step import largest_rate, of_step, share_of
from singd_torch import _fallback

_SETTINGS = tuple(f.name for f in dataclasses.fields(Settings))

# What training finds out about a parameter: why it has no rows, whether its matrices are transposed
# ones, how many refreshes in a row there were without rows, how many with, where its factors do not
# know it, and whether it was not used yet when others were.
FOUND: dict[str, type] = {
    "without_rows": str,
    "turned": bool,
    "missed": int,
    "refreshes": int,
    "unused": bool,
}
Notes: TypeAlias = Mapping[Any, Mapping[str, Any]]  # of parameters
# The key of groups under which checkpoints have the notes of all parameters, as a text in JSON with
# their places and names. torch.distributed.checkpoint puts parameters into other places, puts
# together groups anew, and wants the key in all.
NOTES = "layer_notes"
NO_NOTES = "[]"

# What a group has beside its settings.
_OWN = {"params", "param_names", "steps", "base_lr", "largest_lr"}

# For factors and momenta: nothing can be computed in the floating-point dtypes of 8 bits.
# Factors and momenta leave the range of float16 with the scale of the loss.
_WIDE = torch.float64, torch.float32, torch.bfloat16
DTYPES = *_WIDE, torch.float16

# What groups have in common whose layers can step as one: each layer has its own rate and decay.
# Settings that layers ask for one by one, such as structures and dtypes, are compared with layers.
_SHARED = itemgetter("steps", *(name for name in _SETTINGS if name not in ("lr", "weight_decay")))

# Settings that may be tensors, whose values a script changes in place.
RATES = *_settings.RATES, *_fallback.RATES

# Keys of torch's optimizers that only look like a setting.
_OTHERS = {"alpha", "dampening"}


def readable(value: Any) -> Any:
    """The number in a tensor of the host, which nobody has to wait for; others as they are."""
    return number(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def settings_of(group: dict[str, Any]) -> Settings:
    """The settings of a parameter group."""
    return Settings(**{name: group[name] for name in _SETTINGS})


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile and checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def noted(notes: Notes, name: str) -> dict[Any, Any]:
    """What was found out about parameters under this name."""
    return {p: found[name] for p, found in notes.items() if found.get(name)}


def check_group(group: dict[str, Any]) -> None:
    """Check the settings of a group.

    Raises:
        ValueError: Naming the setting, its value and what it may be.
    """
    group = group | {name: readable(group[name]) for name in RATES}
    validate(settings_of(group))
    rule = rules.get(group["rule"])
    if group["structures"] != "auto" or rule.only_dense:
        rule.choose(group["structures"])
    is_expand(group["kfac_approx"])
    loss_terms(group["loss_average"], 1, ())
    dtypes = group["preconditioner_dtype"]
    check_pair("preconditioner_dtype", dtypes)
    _check_dtypes("preconditioner_dtype", dtypes, dtypes)
    _check_dtypes("momentum_dtype", group["momentum_dtype"], [group["momentum_dtype"]])
    if not isinstance(group["rows"], (int, float)):  # the host cuts arrays by it
        raise ValueError(f"rows={group['rows']!r}: must be a number, infinite for all")
    if not isinstance(group["average_groups"], bool):
        raise ValueError(f"average_groups={group['average_groups']!r}: must be True or False")
    _fallback.check(group)


def _check_dtypes(name: str, given: Any, dtypes: Iterable[Any]) -> None:
    for dtype in dtypes:
        if dtype is not None and dtype not in _WIDE:
            raise ValueError(f"{name}={given!r}: give {', '.join(map(str, _WIDE))}, or None")


def check_counts(group: dict[str, Any]) -> None:
    """Check what a group counts, but for the values of tensors.

    Raises:
        ValueError: Naming the count and what it may be.
    """
    steps, base = group["steps"], group["base_lr"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps={steps!r}: must be an integer of at least 0")
    if not isinstance(base, float) or not 0.0 < base < math.inf:
        raise ValueError(f"base_lr={base!r}: must be positive and finite")
    expected = "at least 0 and finite"
    check_rate("largest_lr", group["largest_lr"], lambda v: 0.0 <= v < math.inf, expected)


def likeness(*groups: dict[str, Any] | None) -> Any:
    """What the groups of a weight and of its bias have in common with those of others.

    If it is equal, their layers can step as one, with rates of their own. With settings in tensors,
    or a bias with a rate of its own, they step with the same groups alone.
    """
    distinct = {id(group): group for group in groups if group is not None}
    found = tuple(map(_shared, distinct.values()))
    try:
        hash(found)
        alone = None in found or len({group["lr"] for group in distinct.values()}) > 1
    except TypeError:  # of an array, or of a function that has no hash
        alone = True
    return tuple(distinct) if alone else found


def are_like(each: Sequence[tuple[dict[str, Any] | None, ...]]) -> bool:
    """Whether the groups of several layers let them step as one."""
    return len(each) == 1 or len({likeness(*groups) for groups in each}) == 1


def _shared(group: dict[str, Any]) -> Any:
    lr, decay, values = group["lr"], group["weight_decay"], _SHARED(group)
    if any(isinstance(value, Tensor) for value in (lr, decay, *values)):
        return None
    # equal schedules of rates that are not equal differ in the last digits
    share = share_of(lr, largest_rate(group["largest_lr"], lr))
    couples = bool(decay) and not group["decoupled_weight_decay"]
    return round(share, 9), couples, *values


def settings_of_step(group: dict[str, Any], matrices: int) -> StepSettings:
    """The settings of a group's next step, in which so many weight matrices are trained.

    Its rate is noted where it is the largest so far.
    """
    s, largest = settings_of(group), group["largest_lr"]
    new = largest_rate(largest, s.lr)
    if isinstance(largest, Tensor) and isinstance(new, Tensor) and largest.dtype == new.dtype:
        new = largest.copy_(new)  # it stays where it is, for a CUDA graph
    group["largest_lr"] = new
    return of_step(s, group["steps"], new, matrices)


def check_keys(group: dict[str, Any], known: Iterable[str]) -> None:
    """Warn of a key that may have been meant for a setting; others are carried along."""
    known = set(known)
    for key, value in group.items():
        is_off = key in SWITCHES and not value
        found = "" if is_off or key in known | _OWN | _OTHERS else hint(key, known)
        if found:
            warn(
                f"a parameter group has {key!r}, which is no setting of SINGD and changes nothing: "
                f"{found}"
            )


def bare(params: Iterable[Any]) -> list[Any]:
    """The parameters, without the names that they may be given with."""
    return [p[-1] if isinstance(p, tuple) and p else p for p in params]


def parameters_of(params: Any) -> list[Any]:
    """The parameters of a group as a list.

    Raises:
        TypeError: If they are in no order, or are none.
    """
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "the parameters are in a set, whose order changes between runs, and so would what a "
            "checkpoint is loaded into: give a list"
        )
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        hint = ""
        if isinstance(params, (int, float)):
            hint = f"; a rate is given by its name, SINGD(model, lr={params!r})"
        elif isinstance(params, nn.Module):
            hint = "; give module.parameters()"
        raise TypeError(f"params must be parameters or groups of them, not {params!r}{hint}")
    if isinstance(params, Mapping):
        raise TypeError(
            "params must be parameters or groups of them, not a dictionary: give a list of groups, "
            "or module.parameters()"
        )
    listed = list(params)
    if any(isinstance(p, nn.Module) for p in listed):
        raise TypeError(
            "params must be parameters or groups of them, not modules: several models are one as "
            "SINGD(nn.ModuleList([first, second])); or give module.parameters()"
        )
    return listed
