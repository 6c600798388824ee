"""What one process steps: the layers that it owns, whole, and its parts of all other parameters."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_torch.layers.layer import Layer
from singd_torch.sharding.boxes import local
from singd_torch.step.stack import Stack, stacks
from singd_torch.step.stepper import Stepper
from singd_torch.tensors.pieces import placed, read


class Share(Stepper):
    """An optimizer of plain tensors that stand in for parameters, which are not those of a model.

    Its steps are those of any other, but whether one is taken is decided by all processes.

    Attributes:
        state: Tensors by stand-in.
        param_groups: Those of the optimizer it is a share of.
        processes: All that step together.
        device: That of the parameters.
        visitors: Layers whose state is elsewhere between steps.
    """

    def __init__(self, processes: dist.ProcessGroup) -> None:
        self.processes, self._compile = processes, None
        self.state = defaultdict(dict)
        self.param_groups = []
        self.device = torch.device("cpu")
        self.visitors: set[Layer] = set()
        self._watch(nn.Module())

    def take_over(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[Layer],
        fallback: Sequence[nn.Parameter],
        group_of: Mapping[nn.Parameter, dict[str, Any]],
        compile: dict[str, Any] | None,
    ) -> None:
        """Step these from now on."""
        self.param_groups, self._compile = groups, compile
        self._layers, self._fallback = list(layers), list(fallback)
        self._group_of = dict(group_of)
        self._names = {layer.weight: layer.name for layer in layers}
        self.device = next((p.device for p in group_of), torch.device("cpu"))
        self._stack_up()

    def let_go(self, layers: Iterable[Layer]) -> None:
        """Have no memory for the state of visitors, whose factors are gone."""
        for layer in layers:
            self._stack_of[layer].let_go()
        self._bundles = [
            bundle for bundle in self._bundles if not any(stack.visits for stack in bundle.stacks)
        ]

    def _stack_up(self, parted: list[Stack] | None = None) -> None:
        if parted is None:
            staying = [layer for layer in self._layers if layer not in self.visitors]
            visiting = [layer for layer in self._layers if layer in self.visitors]
            parted = stacks(staying) + [Stack([layer], visits=True) for layer in visiting]
        super()._stack_up(parted)

    def _of_all(self, size: Any) -> Any:
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        total = placed(size, wide, self.device).clone()
        dist.all_reduce(total, group=self.processes)
        return read(total)


def stand_in(p: Tensor, device: str | None = None) -> nn.Parameter:
    """A plain tensor of the whole shape, without memory until it is given some."""
    nothing = torch.zeros((), dtype=p.dtype, device=device or p.device)
    return nn.Parameter(nothing.expand(p.shape), requires_grad=False)


def stand_ins(layers: Iterable[Layer], device: str | None = None) -> list[Layer]:
    """Layers of plain tensors in the place of others."""
    found = []
    for layer in layers:
        weight, *bias = (stand_in(p, device) for p in layer.parameters)
        own: dict[str, Any] = {"weight": weight, "bias": bias[0] if bias else None}
        found.append(dataclasses.replace(layer, **own, pending={}, factors=None, meter=None))
    return found


def stands_for(layer: Layer, parts: Sequence[nn.Parameter | None]) -> bool:
    """Whether these are the parameters of a layer of stand-ins."""
    own = layer.parameters
    return len(own) == len(parts) and all(a is b for a, b in zip(own, parts, strict=True))


def alias(p: nn.Parameter) -> nn.Parameter:
    """The part of a parameter that is here, as a parameter of its own in the same memory."""
    return nn.Parameter(local(p.detach()), requires_grad=False)
