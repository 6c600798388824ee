"""Steps of a model whose parameters are in parts on several processes, or whose state is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from singd_core.layers import LayerKind
from singd_torch import _diagnostics, _state
from singd_torch._distributed import agree_on_rows, check_is_there
from singd_torch._loading import Loaded
from singd_torch._warnings import listed
from singd_torch.capture.scaling import Scales
from singd_torch.layers.layer import Layer
from singd_torch.layers.roster import Roster, matrices_of
from singd_torch.sharding import is_in_parts, saving
from singd_torch.sharding.alike import Alike
from singd_torch.sharding.box import Box
from singd_torch.sharding.boxes import boxes, local, local_gradient, place_of
from singd_torch.sharding.exchange import Exchange
from singd_torch.sharding.meter import Meter
from singd_torch.sharding.owners import Shares, reads_weights
from singd_torch.sharding.resting import Resting
from singd_torch.sharding.share import Share, alias, slab_of, stand_in, stand_ins, stands_for
from singd_torch.sharding.sums import Sums


class Sharded:
    """The share of this process in the steps of an optimizer, and what it exchanges with others.

    Each layer is owned by one process, which alone has its factors and momenta and steps it as if
    there were no others: it is sent the sums of all rows and all parts of the gradient, and sends
    back how the weights change. Layers whose parts can be stepped by themselves, and all other
    parameters, are stepped in the parts in which they are.

    Attributes:
        group: All processes that step together.
        owners: The rank of the owner of each parameter of a layer, if it has one.
        share: What this process steps.
        sums: What gives the owners the rows of all.
    """

    def __init__(self, group: dist.ProcessGroup, *, summed: bool, in_parts: bool) -> None:
        """Gradients are `summed` over the processes, or averaged; weights may be `in_parts`."""
        self.group, self.sums = group, Sums(group, summed=summed)
        self._in_parts = in_parts
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owners: dict[nn.Parameter, int] = {}
        self._alike, self._copies = Alike(group), dict[nn.Parameter, str]()
        self.share = Share(group)
        self._layers: list[Layer] = []
        self._kinds: dict[Tensor, LayerKind] = {}
        self._fallback: list[nn.Parameter] = []
        self._without_memory: dict[nn.Parameter, str] = {}
        self._places: dict[nn.Parameter, list[Box]] = {}
        self._own: dict[nn.Parameter, Layer] = {}
        self._resting: Resting | None = None
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}

    def arrange(self, roster: Roster, compile: dict[str, Any] | None) -> None:
        """Part the work among the processes, which all call this with the same layers.

        What is known of layers that were there before stays.
        """
        if self._resting is not None:
            self._resting.visit()
        group_of, names, plain = roster.group_of, roster.names, set(self._fallback)
        self._layers, self._fallback = list(roster.layers), list(roster.fallback)
        self._kinds = {layer.weight: layer.kind for layer in self._layers}
        self._without_memory = {p: names.get(p, "") for p in group_of if p.is_meta}
        self._places = boxes(list(group_of), names, self.group)
        found = self.shares(self._layers)
        self._arrange_own(found, plain)
        self.owners = {p: found.owners[w.weight] for w in found.whole for p in w.parameters}
        self._copies = {p: names.get(p, "") for p in self.owners if not is_in_parts(p)}
        self.sums.arrange(self._layers, self.owners)
        self._exchange = Exchange(self.owners, self._places, self.group)
        at_rest = [layer for layer in found.whole if layer.weight in found.resting]
        self._resting = Resting(self.share, at_rest, self._own, self.owners)
        for gone in set(self.share.state) - set(self._stand_ins.values()):
            del self.share.state[gone]
        self.share.take_over(
            roster.groups,
            list(self._own.values()),
            [self._stand_ins[p] for p in self._fallback],
            {s: group_of[p] for p, s in self._stand_ins.items()},
            {s: names.get(p, "") for p, s in self._stand_ins.items()},
            {self._stand_ins[p]: place_of(p) for p in self._fallback},
            compile,
        )

    def check_memory(self) -> None:
        """Refuse parameters that have been given memory since the work was parted.

        Raises:
            RuntimeError: Naming the first.
        """
        names = [name for p, name in self._without_memory.items() if not p.is_meta]
        if names:
            raise RuntimeError(
                f"{listed(names)} had no memory when the optimizer was built: call "
                "model.to_empty(device=...) and initialize the model, then call SINGD(model)"
            )

    def shares(self, layers: Sequence[Layer]) -> Shares:
        """Who steps these layers; all processes find the same."""
        places = self._places if self._in_parts else None
        return Shares.of(layers, self.world, self.owners, places)

    def turned(self, layer: Layer) -> None:
        """Measure rows of a layer as this process alone has found it; `is_arranged` no more."""
        layer.meter = Meter.of(layer)

    def is_arranged(self) -> bool:
        """Whether the layers have the kinds that they had when the work was parted."""
        return all(self._kinds[layer.weight] == layer.kind for layer in self._layers)

    def _arrange_own(self, found: Shares, plain: set[nn.Parameter]) -> None:
        """Have stand-ins for the layers that this process steps, and for its parts of others.

        `plain` are parameters that were no layers' before.
        """
        before, old = self._stand_ins, self._own
        self._own = {}
        self._stand_ins = {p: before[p] if p in plain else alias(p) for p in self._fallback}
        for layer in self._layers:
            layer.meter = Meter.of(layer)
            parts = found.parts.get(layer.weight)
            if parts is None and found.owners[layer.weight] != self.rank:
                continue
            own = old.get(layer.weight)
            part = None if parts is None else parts[self.rank]
            stands = [before.get(p) for p in layer.parameters]
            if own is None or own.kind != layer.kind or not stands_for(own, stands, part):
                own = stand_ins([layer])[0] if part is None else slab_of(layer, part)
            own.group, own.bias_group = layer.group, layer.bias_group
            own.structures, own.notes = layer.structures, layer.notes
            self._own[layer.weight] = own
            self._stand_ins |= zip(layer.parameters, own.parameters, strict=True)

    # ---- the state ------------------------------------------------------------------------------

    def saved(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state of each parameter; all processes call it."""
        check_is_there(self.group)
        assert self._resting is not None
        self._resting.visit()
        found = saving.saved(self.share, self.owners, self._stand_ins)
        self._resting.rest()
        return found

    def loaded(
        self,
        model: nn.Module,
        live: Sequence[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        state_dict: Mapping[str, Any],
    ) -> Loaded:
        """What this process goes on from; all of them call it. Nothing is changed.

        Raises:
            ValueError: Naming the first setting or entry that does not fit.
        """
        return saving.loaded(self.share, self.shares, model, live, names, state_dict)

    def go_on_from(self, found: Loaded) -> None:
        """Have the state that was loaded, of layers that are arranged already."""
        share = self.share
        share.state.clear()
        self.sums.forget()
        if self._resting is not None:
            self._resting.forget()
        for layer in self._layers:
            layer.pending, layer.seen = {}, layer.weight in found.factors
            layer.by_gradient = layer.weight in found.lost
            known = 0 if layer.by_gradient else found.refreshes.get(layer.weight, 0)
            layer.refreshes = layer.notes.get("refreshes", 0) or known
        for p, part in self._stand_ins.items():
            own = found.entries.get(p)
            if own:
                share.state[part] = own
        for weight, layer in self._own.items():
            layer.pending, layer.seen = {}, found.factors.get(weight) is not None
            layer.by_gradient = weight in found.lost
        share.stack_up()

    def begin(self) -> None:
        """Have the state that the first steps would make."""
        share, own = self.share, self._own.values()
        share.state.update(_state.before_any_step(own, share.roster.fallback))

    def show(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Let a state have, by parameter, what this process has, and as `meta` what it has not.

        That is what others have, and what rests in parts of all between steps. So the state has
        the same names on all processes, by which torch takes a flat checkpoint apart.
        """
        for p, part in self._stand_ins.items():
            state[p] = self.share.state[part]
        away = {None, *self.share.visitors}
        others = [layer for layer in self._layers if self._own.get(layer.weight) in away]
        elsewhere = stand_ins(others, device="meta")
        shapes = _state.before_any_step(elsewhere, {})
        for layer, plain in zip(others, elsewhere, strict=True):
            for p, part in zip(layer.parameters, plain.parameters, strict=True):
                state[p] = shapes.get(part, {})

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """The diagnostics of the layers that this process steps. All processes call it."""
        assert self._resting is not None
        self._resting.visit()
        sizes = {layer.name: _diagnostics.norm(layer, _whole(layer)) for layer in self._layers}
        found = self.share.reported(sizes)
        self._resting.rest()
        return found

    # ---- the step -------------------------------------------------------------------------------

    def agree(self, layers: Sequence[Layer]) -> None:
        """Expect the same rows on all processes, which all call this with the same layers."""
        flags = agree_on_rows(layers, self.group, [self.sums.flag(layer) for layer in layers])
        self.sums.flags = {layer.weight: flag for layer, flag in zip(layers, flags, strict=True)}

    def step(self, scales: Scales) -> Tensor | int:
        """Take a step, of all processes at once; how many were skipped so far.

        Raises:
            RuntimeError: If gradients differ of which all processes have copies.
        """
        assert self._resting is not None
        self._alike.check(self._copies)
        self._resting.visit()
        for layer in self._layers:
            if layer.weight in self._own:
                own = self._own[layer.weight]
                own.called_in, own.autocast = layer.called_in, layer.autocast
        self.sums.give(self.share, self._own)
        for layer in self._layers:
            if layer.is_lost():  # as its owner finds
                layer.seen = layer.by_gradient = True
                layer.refreshes = 0
        sent = [layer for layer in self._layers if layer.weight in self.owners]
        trained = [p for layer in sent for p in layer.parameters if p.grad is not None]
        whole = {p for layer in sent if _wants_weights(layer) for p in layer.parameters}
        self._send(trained, whole)
        for p, part in self._stand_ins.items():
            if p in self.owners:
                continue
            part.grad = None
            part.data = local(p)
            if p.grad is not None:
                part.grad = local_gradient(p)
        share = self.share
        share.take_step(*share.ready(), scales, matrices_of(self._layers))
        share.roster.forget_rows()
        self._resting.rest()
        self._return(trained, whole)
        return share.skipped

    def _send(self, trained: Sequence[nn.Parameter], whole: set[nn.Parameter]) -> None:
        """Give the owners gradients, and of `whole` parameters also what they are."""
        for p in self.owners:
            if p in self._stand_ins:
                self._stand_ins[p].grad = None
        for some in self._exchange.buckets(trained):
            with_weights = [p for p in some if p in whole]
            given = [(p, local_gradient(p)) for p in some] + [(p, local(p)) for p in with_weights]
            found = iter(self._exchange.to_owners(given))
            gradients = [next(found) for _ in some]
            weights = dict(zip(with_weights, found, strict=True))
            for p, gradient in zip(some, gradients, strict=True):
                if gradient is not None:
                    part, weight = self._stand_ins[p], weights.get(p)
                    part.data = torch.zeros_like(gradient) if weight is None else weight
                    part.grad = gradient

    def _return(self, trained: Sequence[nn.Parameter], whole: set[nn.Parameter]) -> None:
        """Give all processes the new weights, or how they change where the owner has no weight."""
        mine = self.rank
        for some in self._exchange.buckets(trained):
            given = [(p, self._stand_ins[p].data if self.owners[p] == mine else None) for p in some]
            dtype = reduce(torch.promote_types, (p.dtype for p in some))
            like = torch.empty(0, dtype=dtype, device=some[0].device)
            for p, new in zip(some, self._exchange.to_all(given, like), strict=True):
                if p in whole:
                    local(p).copy_(new)
                else:
                    local(p).add_(new)
                if self.owners[p] == mine:  # its memory is not kept
                    part = self._stand_ins[p]
                    part.grad, part.data = None, stand_in(part).data


def _whole(layer: Layer) -> list[Tensor]:
    """The parameters of a layer; all processes call it."""
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in layer.parameters]


def _wants_weights(layer: Layer) -> bool:
    """Whether the owner has to know the weights now: its step reads them, or AdamW trains them."""
    unseen = layer.kind.has_rows and not layer.seen
    return unseen or layer.weight.grad is None or reads_weights(layer)
