"""Whether what is loaded has the form of a saved state, before anything is read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd_torch._groups import NOTES


def check_form(state_dict: Any) -> None:
    """Check that a saved state is made of the mappings, lists and dense tensors of one.

    Raises:
        ValueError: Naming the first that is something else.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise ValueError(
                f"the checkpoint has no {key!r}: is it what `optimizer.state_dict()` returned?"
            )
        _check_kind(f"{key!r}", state_dict[key], kind)
    for i, group in enumerate(state_dict["param_groups"]):
        _check_kind(f"parameter group {i}", group, Mapping)
        _check_group(f"'{{}}' of parameter group {i}", group)
    for index, entries in state_dict["state"].items():
        _check_kind(f"the state of parameter {index!r}", entries, Mapping)
        for name, value in entries.items():
            if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_meta):
                what = "without memory" if value.is_meta else "sparse"
                raise ValueError(f"{name!r} of parameter {index!r} is {what} in the checkpoint")


def _check_group(title: str, group: Mapping[str, Any]) -> None:
    _check_kind(title.format("params"), group.get("params"), Sequence)
    for name, kind in NOTES.items():
        found = group.get(name, {})
        _check_kind(title.format(name), found, Mapping)
        for place, value in found.items():
            fits = isinstance(place, int) and 0 <= place < len(group["params"])
            if not fits or not isinstance(value, kind):
                raise ValueError(
                    f"{title.format(name)} has {place!r}: {value!r} in the checkpoint, not the "
                    f"place of a parameter with a {kind.__name__}"
                )
    for name, value in group.items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise ValueError(f"{title.format(name)} is not finite in the checkpoint")


def _check_kind(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, (str, bytes)):
        raise ValueError(f"{what} is {value!r} in the checkpoint, not a {kind.__name__.lower()}")
