"""What processes send each other, told from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

from singd_torch._table import factor_bytes, layer_bytes
from singd_torch.layers.layer import Layer
from singd_torch.sharding.local import norms, numbers
from singd_torch.sharding.owners import Shares, reads_weights
from singd_torch.sharding.stream import bytes_of_sums


def volumes(layers: Iterable[Layer], shares: Shares, processes: int) -> tuple[int, int]:
    """The bytes that a process sends on average in a step, and at a refresh beside them.

    The gradients of the model are in parts.
    """
    step = refresh = sums = 0.0
    for layer in layers:
        if layer.has_rows:
            refresh += bytes_of_sums(layer)
        elif layer.weight in shares.parts:  # else its owner learns alone
            refresh += numbers(layer) * max(4, layer.weight.dtype.itemsize)
        if layer.weight in shares.parts:
            sums += 8 * norms(layer)  # in float64
            continue
        parameters = sum(p.numel() * p.element_size() for p in layer.parameters)
        ways = 3 if reads_weights(layer) else 2
        step += ways * parameters / processes
        if layer.weight in shares.resting:
            factors = factor_bytes(layer)
            step += (2 * layer_bytes(layer) - factors) / processes
            refresh += factors / processes
    to_others = (processes - 1) / processes
    return round(step * to_others + sums), round(refresh * to_others)
