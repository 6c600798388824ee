"""The table that `print(optimizer)` shows: who owns each parameter, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from singd_core._array import ranged
from singd_torch._layers import Layer


def rows(
    layers: Iterable[Layer], fallback: Iterable[nn.Parameter], names: dict[nn.Parameter, str]
) -> list[tuple[str, ...]]:
    """A row for each layer and each other parameter: names, shape, rule, structures, bytes."""
    found: list[tuple[str, ...]] = []
    for layer in layers:
        name = layer.name if layer.bias is None else f"{layer.name} + {_last(names, layer.bias)}"
        rule = "KFAC" if layer.group["kfac"] else "SINGD"
        K, C = (cls.name for cls in layer.structures)
        found.append((name, _shape(layer.weight), rule, K, C, _bytes(layer_bytes(layer))))
    for p in fallback:
        size = 2 * p.numel() * ranged(p.new_empty(0)).element_size()
        found.append((names.get(p, "(not of the model)"), _shape(p), "AdamW", "", "", _bytes(size)))
    return found


def layer_bytes(layer: Layer) -> int:
    """Bytes of state of one layer: its factors, and the momentum of its weight matrix."""
    (batch, d_out, d_in), group = layer.shape, layer.group
    stack = 1
    for n in batch:
        stack *= n
    *sizes, momentum = (dtype.itemsize for dtype in layer.dtypes)
    copies = 2 if group["kfac"] or (group["alpha1"] and not group["kfac_like"]) else 1
    total = d_out * d_in * momentum if group["momentum"] else 0
    for cls, d, size in zip(layer.structures, (d_in, d_out), sizes, strict=True):
        total += copies * cls.numbers(d) * size
    return stack * total


def render(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The rows in aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    lines = []
    for row in (header, *body):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]).rstrip())
    return "\n".join(lines)


def _last(names: dict[nn.Parameter, str], p: nn.Parameter) -> str:
    return names.get(p, "bias").rpartition(".")[2]


def _shape(p: Any) -> str:
    return "×".join(map(str, p.shape)) or "1"


def _bytes(n: int) -> str:
    return f"{n:,}"
