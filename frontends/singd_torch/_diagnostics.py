"""What the optimizer does in numbers: computed when asked for, read from the device in one go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from singd_core._array import widen
from singd_core._settings import is_bound
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer
from singd_torch.step.stack import Stack
from singd_torch.tensors.join import join
from singd_torch.tensors.pieces import placed


def read(stacks: Iterable[Stack], sizes: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """The quantities of each layer, by `name of the weight/quantity`.

    `sizes` are the norms of weights that are not here, by the names of layers.
    """
    names, values = [], []
    for stack in stacks:
        if stack.factors is not None:
            for quantity, each in _quantities(stack, sizes).items():
                for layer, value in zip(stack.layers, stack.split(each), strict=True):
                    names.append(f"{layer.name}/{quantity}")
                    values.append(value.max().float())
    if not values:
        return {}
    joined = torch.stack([value.to(values[0].device) for value in values])
    return dict(zip(names, joined.tolist(), strict=True))


def norm(layer: Layer, parameters: Iterable[Tensor]) -> Tensor:
    """The norms of the matrices of a layer. Its parameters may be a stack."""
    matrix: Tensor = widen(layer.kind.matrix(*parameters))
    found: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return found


def _quantities(stack: Stack, sizes: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    factors, report = stack.factors, stack.report or {}
    assert factors is not None
    s = settings_of(stack.layers[0].group)
    like = factors.averages.k
    found = factors.norms()
    found |= {k: placed(v, like.dtype, like.device).expand(like.shape) for k, v in report.items()}
    t = factors.averages
    for name, t_U, damping in zip("KC", (t.t_U, t.t_G), t.damping(s), strict=True):
        if name == "C" or factors.has_rows:  # else t_U is not known
            found[f"{name}_damping"] = damping / (damping + t_U)
        if f"{name}_step" in report and is_bound(s.factor_bound):
            found[f"{name}_bounded"] = found[f"{name}_step"] > s.factor_bound
    if "update" in report:
        if sizes is None:
            size = norm(stack.layers[0], stack.joined(lambda p: p))
        else:
            size = join([sizes[layer.name] for layer in stack.layers])
        found["update"] = report["update"] / size
    return found
