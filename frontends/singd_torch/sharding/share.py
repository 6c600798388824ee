"""What one process steps: the layers that it owns, whole, and its parts of all other parameters."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_core.rounding import Place
from singd_torch import _diagnostics
from singd_torch._distributed import gathered
from singd_torch.layers.layer import Layer
from singd_torch.layers.roster import Roster
from singd_torch.sharding.boxes import local, place_of
from singd_torch.sharding.local import Blocks
from singd_torch.sharding.slab import Slab
from singd_torch.sharding.slabs import advance
from singd_torch.step.begun import Gradients
from singd_torch.step.equal import stacks
from singd_torch.step.stack import Stack
from singd_torch.step.stepper import Stepper
from singd_torch.tensors.pieces import placed, read


class Share(Stepper):
    """Steps plain tensors that stand in for parameters. They belong to no model.

    It steps as any other does, but all processes decide whether a step is taken.

    Attributes:
        state: Tensors by stand-in.
        processes: All that step together.
        device: The device of the parameters.
        visitors: Layers whose state is elsewhere between steps.
    """

    processes: dist.ProcessGroup

    def __init__(self, processes: dist.ProcessGroup) -> None:
        super().__init__(Roster(nn.Module()), defaultdict(dict))
        self.processes = processes
        self.device = torch.device("cpu")
        self.visitors: set[Layer] = set()

    def take_over(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[Layer],
        fallback: Sequence[nn.Parameter],
        group_of: Mapping[nn.Parameter, dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        places: Mapping[nn.Parameter, Place],
        compile: dict[str, Any] | None,
    ) -> None:
        """Step these from now on, of these names; `places` says where others stand in the whole."""
        roster, self.compile, self.places = self.roster, compile, places
        roster.groups, roster.group_of, roster.names = groups, dict(group_of), dict(names)
        roster.layers, roster.fallback = list(layers), {p: group_of[p] for p in fallback}
        self.device = next((p.device for p in group_of), torch.device("cpu"))
        self.stack_up()

    def reported(self, sizes: Mapping[str, Tensor]) -> dict[str, float]:
        """The diagnostics of its layers, with the norms of weights by the names of layers."""
        self.report()
        for stack in self.stacks:
            if stack.visits and stack.is_known(self.state):
                stack.tie(self.state)
        return _diagnostics.read(self.stacks, sizes)

    def gathered(self, found: Any) -> list[Any]:
        """What each process has found, on all of them, which all call this."""
        return gathered(found, self.processes, self.device)

    def let_go(self, layers: Iterable[Layer]) -> None:
        """Have no memory for the state of visitors, whose factors are gone."""
        for layer in layers:
            self.stack_of[layer].let_go()
        self.bundles = [
            bundle for bundle in self.bundles if not any(stack.visits for stack in bundle.stacks)
        ]

    def stack_up(self) -> None:
        """Let equal layers step together, but for those whose state is elsewhere between steps."""
        layers = self.roster.layers
        alone = {layer for layer in layers if isinstance(layer, Slab)} | self.visitors
        others = (layer for layer in layers if layer not in alone)
        parted = stacks(others, by_group=self.compile is not None)
        visits = self.visitors
        self._have(parted + [Stack([one], visits=one in visits) for one in layers if one in alone])
        for stack in self.stacks:
            if isinstance(stack.layers[0], Slab):
                stack.compile = None

    def _advance(self, ready: list[Stack], given: Gradients) -> list[tuple[Sequence[Stack], Any]]:
        slabs = [stack for stack in ready if isinstance(stack.layers[0], Slab)]
        whole = [stack for stack in ready if not isinstance(stack.layers[0], Slab)]
        moved = super()._advance(whole, given)
        each = advance(slabs, self.state, given, self._total, self._wide)
        return moved + [([slab], m) for slab, m in zip(slabs, each, strict=True)]

    def _of_all(self, size: Any) -> Any:
        return read(self._total(placed(size, self._wide, self.device).clone()))

    def _total(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, group=self.processes)
        return t

    @property
    def _wide(self) -> torch.dtype:
        """In which numbers of all processes are summed."""
        return torch.float64 if self.device.type == "cpu" else torch.float32


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
        found.append(dataclasses.replace(layer, **own, pending={}, meter=None))
    return found


def slab_of(layer: Layer, blocks: Blocks) -> Slab:
    """A layer of the parts of its parameters that are here."""
    own = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    weight, *bias = map(alias, layer.parameters)
    own |= {"weight": weight, "bias": bias[0] if bias else None}
    own |= {"pending": {}, "meter": None}
    places = tuple(map(place_of, layer.parameters))
    return Slab(**own, whole=tuple(layer.weight.shape), blocks=blocks, places=places)


def stands_for(layer: Layer, params: Sequence[nn.Parameter | None], blocks: Blocks | None) -> bool:
    """Whether these are the parameters of a stand-in, which is of such blocks."""
    own = layer.parameters
    same = len(own) == len(params) and all(a is b for a, b in zip(own, params, strict=True))
    return same and blocks == (layer.blocks if isinstance(layer, Slab) else None)


def alias(p: nn.Parameter) -> nn.Parameter:
    """The part of a parameter that is here, as a parameter of its own in the same memory."""
    return nn.Parameter(local(p.detach()), requires_grad=False)
