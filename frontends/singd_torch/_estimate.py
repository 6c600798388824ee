"""What the state will cost, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from singd_core._recipes import STRUCTURES, check_names, settings
from singd_core.structures import choose
from singd_torch import _table
from singd_torch._groups import check_group
from singd_torch.layers.layer import Layer
from singd_torch.layers.matrices import find_all
from singd_torch.sharding.box import rows
from singd_torch.sharding.owners import Shares
from singd_torch.sharding.volumes import volumes

# What a group has beside the settings, and the values that are taken where none are given.
OPTIONS: dict[str, Any] = {
    "loss_average": "batch",
    "kfac_approx": "expand",
    "preconditioner_dtype": (None, None),
    "momentum_dtype": None,
    "average_groups": False,
    "fallback_lr": 0.0,
    "fallback_betas": (0.9, 0.999),
    "fallback_eps": 1e-8,
    "fallback_weight_decay": 0.01,
}


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """Bytes of state of each layer, and of each parameter that AdamW trains.

    Attributes:
        bytes: The bytes, by the name of the weight or parameter.
        table: Lines with names, shapes, structures and bytes.
        by_process: The bytes on each process, for a model in parts on several processes.
        sent_by_step: The bytes that a process sends in each step, on average.
        sent_by_refresh: The bytes that it sends in addition in a step with a refresh.
    """

    bytes: dict[str, int]
    table: str
    by_process: tuple[int, ...] = ()
    sent_by_step: int = 0
    sent_by_refresh: int = 0

    @property
    def total(self) -> int:
        """Bytes of state in all."""
        return sum(self.bytes.values())

    def __repr__(self) -> str:
        """The table, and the sum."""
        text = f"{self.table}\n{self.total:,} bytes in all"
        if len(self.by_process) > 1:
            least, most = min(self.by_process), max(self.by_process)
            text += f", {least:,} to {most:,} on each of {len(self.by_process)} processes; "
            text += f"{self.sent_by_step:,} are sent by each in a step, "
            text += f"and {self.sent_by_refresh:,} more at a refresh"
        return text


def estimate(
    model: nn.Module,
    structures: choose.Structures | None = None,
    *,
    memory_budget: int | None = None,
    recipe: str = "normalized",
    processes: int = 1,
    **given: Any,
) -> Estimate:
    """The bytes of state that `SINGD(model, structures=..., ...)` will hold.

    Args:
        model: The model; it may be on the `meta` device.
        structures: As for `SINGD`.
        memory_budget: As for `SINGD`, with `structures="auto"`.
        recipe: As for `SINGD`.
        processes: How many have parts of the model, by `fully_shard`, or of the state.
        **given: Settings, and all that a parameter group may have, such as `preconditioner_dtype`.

    Raises:
        ValueError: If a setting is wrong, or nothing fits the budget.

    Example:
        >>> estimate(nn.Linear(1000, 10), structures=("diagonal", "dense")).total
        48488
    """
    options = {name: given.pop(name) for name in tuple(given) if name in OPTIONS}
    check_names(given, OPTIONS)
    group = vars(settings(recipe, **given)) | OPTIONS | options
    params = [p for p in model.parameters() if p.requires_grad]
    group |= {"params": params}
    group["structures"] = STRUCTURES[recipe] if structures is None else structures
    check_group(group)
    if structures == "auto" or memory_budget is not None:
        group["structures"] = automatic(model, [group], memory_budget)
    layers = find_all(model, [group])
    owned = {p for layer in layers for p in layer.parameters}
    fallback = {p: group for p in params if p not in owned}
    names = {p: name for name, p in model.named_parameters()}
    sizes = {layer.name: _table.layer_bytes(layer) for layer in layers}
    sizes |= {names[p]: _table.fallback_bytes(p, group) for p in fallback}
    if processes < 1:
        raise ValueError(f"processes={processes!r}: must be at least 1")
    places = {p: rows(p.shape, processes) for p in params}
    shares = Shares.of(layers, processes, {}, places if processes > 1 else None)
    fallback_bytes = sum(sizes[names[p]] for p in fallback)
    by_process = [-(-fallback_bytes // processes)] * processes
    for layer in layers:
        size, parts = sizes[layer.name], shares.parts.get(layer.weight)
        if parts is not None:
            factors = _table.factor_bytes(layer)
            for r in range(processes):
                own = sum(places[p][r].numel for p in layer.parameters)
                total = sum(p.numel() for p in layer.parameters)
                by_process[r] += factors + (size - factors) * own // total
        elif layer.weight in shares.resting:
            by_process = [own + -(-size // processes) for own in by_process]
        else:
            by_process[shares.owners[layer.weight]] += size
    owners = shares.owners
    table = _table.table(layers, fallback, names, owners=owners if processes > 1 else None)
    return Estimate(sizes, table, tuple(by_process), *volumes(layers, shares, processes))


def automatic(model: nn.Module, groups: Sequence[dict[str, Any]], budget: int | None) -> str:
    """`"auto:b"` with the largest b for which the state fits the budget, in bytes.

    Raises:
        ValueError: If there is no budget, or not even diagonal factors fit it.
    """
    if not any(group["structures"] == "auto" for group in groups):
        raise ValueError(f'memory_budget={budget!r} is for structures="auto" alone')
    if budget is None:
        raise ValueError('structures="auto" needs memory_budget=, in bytes')

    def cost(b: int) -> int:
        auto = [
            group | {"structures": f"auto:{b}"} if group["structures"] == "auto" else group
            for group in groups
        ]
        return _cost(find_all(model, auto), auto)

    # diagonal factors that learn from gradients have the means of inputs beside them
    least = min(cost(1), cost(2))
    if least > budget:
        raise ValueError(f"memory_budget={budget:,}: diagonal factors already need {least:,} bytes")
    layers = find_all(model, [group | {"structures": "auto:2"} for group in groups])
    low, high = 1, max((max(layer.shape[1:]) for layer in layers), default=1)
    while low < high:  # the cost grows with b from 2 on
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return f"auto:{low}"


def _cost(layers: Iterable[Layer], groups: Iterable[dict[str, Any]]) -> int:
    layers = list(layers)
    owned = {p for layer in layers for p in layer.parameters}
    others = ((p, group) for group in groups for p in group["params"] if p not in owned)
    of_layers = sum(map(_table.layer_bytes, layers))
    return of_layers + sum(_table.fallback_bytes(p, group) for p, group in others)
