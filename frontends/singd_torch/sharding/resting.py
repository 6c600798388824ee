"""State of large layers: it visits their owner for a step, and rests in parts on all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_core._settings import is_due
from singd_torch import _state
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer
from singd_torch.sharding.box import Box, rows
from singd_torch.sharding.exchange import Exchange
from singd_torch.sharding.share import Share, stand_ins

# A weight, and whether it is of what every step changes (momenta), or of factors.
Half: TypeAlias = tuple[nn.Parameter, bool]
# Places of tensors in the state of a layer's parameters, by index and name, and tensors like them.
Form: TypeAlias = Sequence[tuple[int, str, Tensor]]


class Resting:
    """The state of layers with which a process would have more than its share.

    Between steps each process has as many bytes of each of them. All know from shapes alone what is
    sent; an owner whose state is not complete yet keeps it, and sends nothing of worth.
    """

    def __init__(
        self,
        share: Share,
        layers: Iterable[Layer],
        own: Mapping[nn.Parameter, Layer],
        owners: Mapping[nn.Parameter, int],
    ) -> None:
        """For layers of the model, and those that the `share` of this process steps, by weight."""
        self._share, self._layers, self._own = share, list(layers), own
        self._owners = owners
        self._forms: dict[Half, Form] = {}
        self._boxes: dict[Half, list[Box]] = {}
        share.visitors = {own[layer.weight] for layer in self._layers if layer.weight in own}
        self.forget()

    def forget(self) -> None:
        """Have nothing that rests."""
        self._here: dict[Half, Tensor] = {}  # the parts of this process
        self._absent: set[nn.Parameter] = set()  # at owners: what has no memory here
        self._complete: set[nn.Parameter] = set()  # at owners: whose factors rest
        self._changing: set[nn.Parameter] = set()

    def visit(self) -> None:
        """Give the owners their state before a step; all processes call it."""
        self._changing = {layer.weight for layer in self._layers if _factors_change(layer)}
        if not self._here:
            return
        exchange = Exchange(self._owner_of(self._here), self._boxes, self._share.processes)
        whole: dict[Half, Tensor | None] = {}
        for some in exchange.buckets(self._here):
            found = exchange.to_owners([(half, self._here[half]) for half in some])
            whole |= zip(some, found, strict=True)
        for weight in self._absent:
            for half in ((weight, False), (weight, True)):
                packed = whole[half]
                assert packed is not None
                self._unpack(half, packed)
        self._absent = set()
        self._here = {half: t for half, t in self._here.items() if not half[1]}

    def rest(self) -> None:
        """Take their state from the owners after a step; all processes call it."""
        if not self._layers:
            return
        halves = dict.fromkeys(
            (layer.weight, moves)
            for layer in self._layers
            for moves in (False, True)
            if moves or (layer.weight, False) not in self._here or layer.weight in self._changing
        )
        of = {layer.weight: layer for layer in self._layers}
        self._forms |= {half: _form(of[half[0]], moves=half[1]) for half in halves}
        world = dist.get_world_size(self._share.processes)
        for half in halves:
            self._boxes[half] = rows((sum(t.nbytes for *_, t in self._forms[half]),), world)
        leaving = {
            weight
            for weight in (layer.weight for layer in self._layers if layer.weight in self._own)
            if (weight in self._complete or (weight, False) in halves) and self._fits(weight)
        }
        exchange = Exchange(self._owner_of(halves), self._boxes, self._share.processes)
        like = torch.empty(0, dtype=torch.uint8, device=self._share.device)
        for some in exchange.buckets(halves):
            given = [(half, self._packed(half, leaving)) for half in some]
            for half, part in zip(some, exchange.to_all(given, like), strict=True):
                self._here[half] = part.clone()
        self._complete = leaving
        for weight in leaving:
            self._leave(weight)
        self._share.let_go(self._own[weight] for weight in leaving)

    def _owner_of(self, halves: Iterable[Half]) -> dict[Half, int]:
        return {half: self._owners[half[0]] for half in halves}

    def _entries(self, half: Half) -> list[tuple[Tensor | None, Tensor]]:
        """What the state has of a half, None where it has nothing, and what it should be like."""
        parameters, state = self._own[half[0]].parameters, self._share.state
        return [(state[parameters[k]].get(name), like) for k, name, like in self._forms[half]]

    def _fits(self, weight: nn.Parameter) -> bool:
        """Whether all is there that other processes expect."""
        return all(
            t is not None and t.shape == like.shape and t.dtype == like.dtype
            for moves in (False, True)
            for t, like in self._entries((weight, moves))
        )

    def _packed(self, half: Half, leaving: set[nn.Parameter]) -> Tensor | None:
        """The bytes of a half at its owner, zeros if they stay there."""
        if half[0] not in self._own:
            return None
        last = self._boxes[half][-1]
        size = last.offset[0] + last.shape[0]
        flat = torch.zeros(size, dtype=torch.uint8, device=self._share.device)
        if half[0] in leaving:
            for (t, _), place in zip(self._entries(half), self._places(half, flat), strict=True):
                assert t is not None
                numbers = t.contiguous().as_strided((t.numel(),), (1,))  # one may have any stride
                place.copy_(numbers.view(torch.uint8))
        return flat

    def _unpack(self, half: Half, packed: Tensor) -> None:
        """Let the state have a half again."""
        parameters = self._own[half[0]].parameters
        places = self._places(half, packed)
        for (k, name, like), place in zip(self._forms[half], places, strict=True):
            t = place.clone().view(like.dtype).reshape(like.shape)  # where numbers may begin
            self._share.state[parameters[k]][name] = t

    def _places(self, half: Half, flat: Tensor) -> Sequence[Tensor]:
        """The bytes of each tensor."""
        return torch.split(flat, [t.nbytes for *_, t in self._forms[half]])

    def _leave(self, weight: nn.Parameter) -> None:
        """Keep nothing of a layer."""
        layer = self._own[weight]
        self._absent.add(weight)
        for moves in (False, True):
            for k, name, _ in self._forms[weight, moves]:
                del self._share.state[layer.parameters[k]][name]


def _form(layer: Layer, *, moves: bool) -> Form:
    """What the state has of a layer after a step, on `meta`."""
    (plain,) = stand_ins([layer], device="meta")
    state = _state.before_any_step([plain], {})
    return [
        (k, name, t)
        for k, p in enumerate(plain.parameters)
        for name, t in state.get(p, {}).items()
        if (name == _state.MOMENTUM or name.startswith(_state.LATE)) == moves
    ]


def _factors_change(layer: Layer) -> bool:
    """Whether the step to come refreshes factors, or measures levels for one that does."""
    s, steps = settings_of(layer.group), layer.group["steps"]
    return not layer.rows_seen or is_due(steps, s) or is_due(steps + 1, s)
