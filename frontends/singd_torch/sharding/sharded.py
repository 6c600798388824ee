"""Steps of a model whose parameters are in parts on several processes, or whose state is to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from singd_core.curvature import seen
from singd_core.rules import Factors
from singd_core.rules.inverse_free import InverseFree
from singd_core.rules.shampoo import Shampoo
from singd_torch import _state
from singd_torch._loading import Loaded
from singd_torch.capture.scaling import Scales
from singd_torch.capture.watcher import is_due
from singd_torch.layers.layer import Key, Layer
from singd_torch.layers.pending import Pending
from singd_torch.sharding import saving
from singd_torch.sharding.boxes import boxes, local, local_gradient
from singd_torch.sharding.exchange import Exchange
from singd_torch.sharding.meter import Meter, by_samples
from singd_torch.sharding.owners import balanced
from singd_torch.sharding.share import Share, alias, stand_in, stand_ins, stands_for


class Sharded:
    """The share of this process in the steps of an optimizer, and what it exchanges with others.

    Each layer is owned by one process, which alone has its factors and momenta and steps it as if
    there were no others: it is sent the sums of all rows and all parts of the gradient, and sends
    back how the weights change. All other parameters are stepped in the parts in which they are.

    Attributes:
        group: All processes that step together.
        owners: The rank of the owner of each parameter of a layer.
        share: What this process steps.
    """

    def __init__(self, group: dist.ProcessGroup, *, summed: bool) -> None:
        self.group, self._summed = group, summed
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owners: dict[nn.Parameter, int] = {}
        self.share = Share(group)
        self._layers: list[Layer] = []
        self._fallback: list[nn.Parameter] = []
        self._own: dict[nn.Parameter, Layer] = {}
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        self._tensor_parallel: DeviceMesh | None = None
        self._split: set[nn.Parameter] = set()

    def arrange(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[Layer],
        fallback: Sequence[nn.Parameter],
        compile: dict[str, Any] | None,
    ) -> None:
        """Part the work among the processes, which all call this with the same layers.

        What is known of layers that were there before stays.
        """
        before, plain = self._stand_ins, set(self._fallback)
        owners = balanced(layers, self.world, self.owners)
        self._layers, self._fallback = list(layers), list(fallback)
        self.owners = {p: owners[layer.weight] for layer in layers for p in layer.parameters}
        places = boxes(list(self.owners), self.group)
        self._exchange = Exchange(self.owners, places, self.group)
        self._stand_ins = {p: before[p] if p in plain else alias(p) for p in fallback}
        own: dict[nn.Parameter, Layer] = {}
        for layer in layers:
            layer.meter = Meter.of(layer)
            if owners[layer.weight] != self.rank:
                continue
            known = self._own.get(layer.weight)
            parts = [before.get(p) for p in layer.parameters]
            if known is None or known.kind != layer.kind or not stands_for(known, parts):
                (known,) = stand_ins([layer])
            known.group, known.bias_group = layer.group, layer.bias_group
            known.structures = layer.structures
            own[layer.weight] = known
            self._stand_ins |= zip(layer.parameters, known.parameters, strict=True)
        self._own = own
        for gone in set(self.share.state) - set(self._stand_ins.values()):
            del self.share.state[gone]
        group_of = {p: group for group in groups for p in group["params"]}
        self.share.take_over(
            groups,
            list(own.values()),
            [self._stand_ins[p] for p in fallback],
            {s: group_of[p] for p, s in self._stand_ins.items()},
            compile,
        )

    # ---- the state ------------------------------------------------------------------------------

    def saved(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state of each parameter; all processes call it."""
        return saving.saved(self.share, self.owners, self._stand_ins)

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
        return saving.loaded(self.share, self.owners, model, live, names, state_dict)

    def go_on_from(self, found: Loaded) -> None:
        """Have the state that was loaded, of layers that are arranged already."""
        share = self.share
        share.state.clear()
        for p, part in self._stand_ins.items():
            own = found.entries.get(p)
            if own:
                share.state[part] = own
        lost = self._lost(found.factors)
        for layer in self._layers:
            layer.pending, layer.seen = {}, layer.weight in found.factors
            layer.by_gradient = layer.weight in lost
        for weight, layer in self._own.items():
            layer.pending, layer.factors = {}, found.factors.get(weight)
            layer.seen, layer.by_gradient = layer.factors is not None, weight in lost
        share._stack_up()

    def _lost(self, factors: Mapping[nn.Parameter, Factors | None]) -> set[nn.Parameter]:
        """The weights of layers whose rows were never seen, which their owners know."""
        own = [
            layer.kind.has_rows and isinstance(factors.get(layer.weight), Shampoo)
            for layer in self._layers
        ]
        flags = torch.tensor(own, dtype=torch.float32, device=self.share.device)
        dist.all_reduce(flags, group=self.group)
        pairs = zip(self._layers, flags.tolist(), strict=True)
        return {layer.weight for layer, flag in pairs if flag}

    def begin(self) -> None:
        """Have the state that the first steps would make."""
        own = list(self._own.values())
        share = self.share
        share.state.update(_state.before_any_step(own, share._fallback))

    def show(self, state: dict[Any, dict[str, Tensor]]) -> None:
        """Let a state have, by parameter, what this process has, and what others have as `meta`."""
        for p, part in self._stand_ins.items():
            state[p] = self.share.state[part]
        others = [layer for layer in self._layers if layer.weight not in self._own]
        elsewhere = stand_ins(others, device="meta")
        shapes = _state.before_any_step(elsewhere, [])
        for layer, plain in zip(others, elsewhere, strict=True):
            for p, part in zip(layer.parameters, plain.parameters, strict=True):
                state[p] = shapes.get(part, {})

    def rows(self, layer: Layer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a call that are those of this process alone."""
        if isinstance(g, DTensor):
            self._tensor_parallel = g.device_mesh
            self._split.add(layer.weight)
            return by_samples(x), by_samples(g)
        return x, g

    # ---- the step -------------------------------------------------------------------------------

    def step(self, scales: Scales) -> Tensor | int:
        """Take a step, of all processes at once; how many were skipped so far."""
        self._reduce_rows()
        for layer in self._layers:
            if layer.is_lost():  # as its owner finds
                layer.seen = layer.by_gradient = True
        trained = [p for layer in self._layers for p in layer.parameters if p.grad is not None]
        whole = {p for layer in self._layers if _wants_weights(layer) for p in layer.parameters}
        self._send(trained, [p for p in trained if p in whole])
        for p in self._fallback:
            part, place = self._stand_ins[p], local(p)
            part.grad = None
            part.data = place
            if p.grad is not None:
                part.grad = local_gradient(p)
        share = self.share
        share._take_step(*share._ready(), scales)
        share._forget_rows()
        self._return(trained, whole)
        return share._skipped

    def _send(self, trained: Sequence[nn.Parameter], whole: Sequence[nn.Parameter]) -> None:
        """Give the owners gradients, and of some parameters also what they are."""
        for layer in self._own.values():
            for part in layer.parameters:
                part.grad = None
        if not trained:
            return
        given = [(p, local_gradient(p)) for p in trained] + [(p, local(p)) for p in whole]
        found = iter(self._exchange.to_owners(given))
        gradients = [next(found) for _ in trained]
        weights = dict(zip(whole, found, strict=True))
        for p, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                part, weight = self._stand_ins[p], weights.get(p)
                part.data = torch.zeros_like(gradient) if weight is None else weight
                part.grad = gradient

    def _return(self, trained: Sequence[nn.Parameter], whole: set[nn.Parameter]) -> None:
        """Give all processes the new weights, or how they change where the owner has no weight."""
        if not trained:
            return
        mine = self.rank
        given = [(p, self._stand_ins[p].data if self.owners[p] == mine else None) for p in trained]
        dtype = reduce(torch.promote_types, (p.dtype for p in trained))
        like = torch.empty(0, dtype=dtype, device=trained[0].device)
        for p, new in zip(trained, self._exchange.to_all(given, like), strict=True):
            if p in whole:
                local(p).copy_(new)
            else:
                local(p).add_(new)
            if self.owners[p] == mine:  # its memory is not kept
                part = self._stand_ins[p]
                part.grad, part.data = None, stand_in(part).data

    # ---- rows -----------------------------------------------------------------------------------

    def _reduce_rows(self) -> None:
        """Give the owners the sums of the rows of all processes."""
        due = [layer for layer in self._layers if layer.weight.requires_grad and is_due(layer)]
        entries = [
            (layer, key, layer.pending.get(key) or layer.no_rows(key))
            for layer in due
            for key in layer.roles()
        ]
        if not entries:
            return
        known = self._rows_known(entries)
        flats = {}
        for owner in range(self.world):
            tensors = [
                t
                for layer, _, pending in entries
                if self.owners[layer.weight] == owner
                for t in self._contribution(layer, pending)
            ]
            if tensors:
                wide = any(t.dtype == torch.float64 for t in tensors)
                dtype = torch.float64 if wide else torch.float32
                flats[owner] = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
        for owner, flat in flats.items():
            dist.reduce(flat, dist.get_global_rank(self.group, owner), group=self.group)
        if self.rank in flats:
            own = [e for e in entries if self.owners[e[0].weight] == self.rank]
            self._take(own, flats[self.rank], known)
        for layer, _ in known:
            layer.seen, layer.by_gradient = True, False

    def _take(
        self,
        entries: Sequence[tuple[Layer, Key, Pending]],
        sums: Tensor,
        known: set[tuple[Layer, Key]],
    ) -> None:
        """Make the sums over all processes those that the layers of the share step with."""
        start = 0
        for layer, key, pending in entries:
            tensors = []
            for t in pending.tensors():
                end = start + t.numel()
                tensors.append(sums[start:end].reshape(t.shape).to(t.dtype))
                start = end
            if not layer.rows_seen and (layer, key) not in known:
                continue
            mean, own = layer.group["loss_average"] is not None, self._own[layer.weight]
            pending = pending.of_all(tensors, self._averaged(), mean=mean)
            self.share._factors(own)
            factors = own.factors_of(key[0])
            if isinstance(factors, InverseFree):
                inputs, outputs = seen(factors.K, pending.inputs), seen(factors.C, pending.outputs)
                pending = dataclasses.replace(pending, inputs=inputs, outputs=outputs)
            own.pending[key] = pending

    def _contribution(self, layer: Layer, pending: Pending) -> list[Tensor]:
        """What this process adds to the sums. Rows that several have are added by one of them."""
        tensors, mesh = pending.tensors(), self._tensor_parallel
        if mesh is None or layer.weight in self._split or mesh.get_local_rank() == 0:
            return tensors
        return [torch.zeros_like(t) for t in tensors]

    def _rows_known(self, entries: Iterable[tuple[Layer, Key, Pending]]) -> set[tuple[Layer, Key]]:
        """Of layers that never had rows, which have some now: the only thing that is waited for."""
        asked = [(layer, key, pending) for layer, key, pending in entries if not layer.rows_seen]
        if not asked:
            return set()
        counts = torch.stack([pending.tensors()[-2].double() for *_, pending in asked])
        dist.all_reduce(counts, group=self.group)
        pairs = zip(asked, counts.tolist(), strict=True)
        return {(layer, key) for (layer, key, _), n in pairs if n > 0}

    def _averaged(self) -> int:
        """How many losses the gradients are an average of: tensor parallelism shares one."""
        mesh = self._tensor_parallel
        return 1 if self._summed else self.world // (1 if mesh is None else mesh.size())


def _wants_weights(layer: Layer) -> bool:
    """Whether the owner has to know the weights, as they decay or AdamW trains them."""
    unseen = layer.kind.has_rows and not layer.seen
    if unseen or layer.weight.grad is None:
        return True
    groups = [layer.group] if layer.bias_group is None else [layer.group, layer.bias_group]
    decays = [group["weight_decay"] for group in groups]
    return any(isinstance(decay, Tensor) or decay != 0.0 for decay in decays)
