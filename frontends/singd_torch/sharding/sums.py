"""The sums of the rows of all processes, which those that step a layer are sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from singd_core.rules import Factors
from singd_torch._distributed import flattened
from singd_torch.layers.due import is_due, is_refresh
from singd_torch.layers.layer import Key, Layer
from singd_torch.layers.pending import Pending, part_of
from singd_torch.layers.source import Source
from singd_torch.sharding.meter import by_samples
from singd_torch.sharding.share import Share
from singd_torch.sharding.stream import Entry, Flat, Place, Stream


class Sums:
    """Sums rows over processes. Tensor parallelism has several of them work on the same rows.

    Attributes:
        stream: What sends sums while a backward pass runs.
        flags: What became of rows after they were sent, on all processes, by weight.
    """

    def __init__(self, group: dist.ProcessGroup, *, summed: bool) -> None:
        """Gradients are `summed` over the processes, or averaged."""
        self._group, self._summed = group, summed
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._layers: Sequence[Layer] = ()
        self._owners: Mapping[nn.Parameter, int] = {}
        self._tensor_parallel: DeviceMesh | None = None
        self._split: set[nn.Parameter] = set()
        self.stream = Stream(group, self._flats)
        self.flags: dict[nn.Parameter, int] = {}

    def arrange(self, layers: Sequence[Layer], owners: Mapping[nn.Parameter, int]) -> None:
        """Sum the rows of these layers from now on; all processes call it.

        A layer without an owner is one that all step.
        """
        self.stream.rearrange(self._expected(), self.flags)
        self._layers, self._owners = layers, owners

    def forget(self) -> None:
        """Drop what was sent."""
        self.flags = {}
        self.stream.forget()

    def rows(
        self, layer: Layer, source: Source, x: Tensor, g: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The samples of a call that this process alone measures, and their mask."""
        if not isinstance(g, DTensor):
            return x, g, mask
        mesh = self._tensor_parallel = g.device_mesh
        self._split.add(layer.weight)
        if g.ndim < layer.weight.ndim - layer.is_stack:  # a sample without a batch
            x, g = x[None], g[None]
        axis = source.samples_axis(x)
        if mask is not None and len(mask) == x.shape[axis]:
            mask = by_samples(DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim), 0)
        else:
            mask = None  # which is of other layers
        return by_samples(x, axis), by_samples(g, axis), mask

    def took(self, layer: Layer, measure: Callable[[], None]) -> None:
        """A call has brought rows of a layer; `measure` makes sums of those that wait."""
        self.stream.took(layer, self._expected, measure)

    def dropped(self, layer: Layer) -> None:
        """The rows that a layer has had so far do not count."""
        self.stream.dropped(layer)

    def flag(self, layer: Layer) -> int:
        """What became of the rows of a layer after this process had sent them."""
        return self.stream.flag(layer)

    def give(self, share: Share, own: Mapping[nn.Parameter, Layer]) -> None:
        """Let the layers of this process have the sums of all; all processes call it in a step."""
        due = self._due()
        sent = self.stream.sent(self._expected(), self.flags)
        entries = [(layer, *own) for layer in due for own in layer.all_pending().items()]
        known = self._rows_known(entries)
        rest = [
            (layer, key, pending)
            for layer, key, pending in entries
            if (layer.weight, key) not in sent or self.flags.get(layer.weight, 0)
        ]
        found: dict[Place, list[Tensor]] = {}
        for flat in self._flats(rest):
            flat.send(self._group, wait=True)
            if flat.is_for(self._rank):
                found |= flat.read()
        for layer, key, pending in entries:
            mine = own.get(layer.weight)
            goes_on = layer.rows_seen and not layer.is_lost()  # else its gradient refreshes
            if mine is not None and (goes_on or (layer, key) in known):
                each = [s[layer.weight, key] for s in (sent, found) if s.get((layer.weight, key))]
                total = [sum(tensors[1:], tensors[0]) for tensors in zip(*each, strict=True)]
                by = part_of(share.factors(mine), key[0])
                mine.pending[key] = self._of_all(mine, pending, by, total)
        for layer, _ in known:
            layer.seen, layer.by_gradient = True, False
        self.stream.learn(due)

    def _due(self) -> list[Layer]:
        return [layer for layer in self._layers if layer.is_trained and is_due(layer)]

    def _expected(self) -> list[Layer]:
        """The layers that would be due if this process had lost none of their rows."""
        return [layer for layer in self._layers if layer.is_trained and is_refresh(layer.group)]

    def _flats(self, entries: Iterable[Entry]) -> list[Flat]:
        """What this process adds to the sums, in a row for each owner, and for all."""
        of: dict[int | None, list[Entry]] = {owner: [] for owner in (None, *range(self._world))}
        for entry in entries:
            of[self._owners.get(entry[0].weight)].append(entry)
        found = []
        for owner, own in of.items():
            if not own:
                continue
            tensors = [t for layer, _, pending in own for t in self._contribution(layer, pending)]
            found.append(Flat(owner, own, flattened(tensors)))
        return found

    def _contribution(self, layer: Layer, pending: Pending) -> list[Tensor]:
        """What this process adds to the sums. What several have is added by one of them."""
        tensors, mesh = pending.tensors(), self._tensor_parallel
        if mesh is None or not any(mesh.get_coordinate() or ()):
            return tensors
        if layer.weight not in self._split:
            return [torch.zeros_like(t) for t in tensors]
        if isinstance(layer.group["loss_average"], int):  # as many terms, whatever the samples
            tensors[-1] = torch.zeros_like(tensors[-1])
        return tensors

    def _of_all(self, own: Layer, pending: Pending, by: Factors, sums: Sequence[Tensor]) -> Pending:
        """The rows of all processes, as the factors of a layer measure them."""
        mean = own.group["loss_average"] is not None
        pending = pending.of_all(sums, self._averaged(), mean=mean)
        inputs, outputs = by.seen(pending.inputs, pending.outputs)
        return dataclasses.replace(pending, inputs=inputs, outputs=outputs)

    def _rows_known(self, entries: Iterable[Entry]) -> set[tuple[Layer, Key]]:
        """Of layers that never had rows, which have some now: the only thing that is waited for."""
        asked = [(layer, key, pending) for layer, key, pending in entries if not layer.rows_seen]
        if not asked:
            return set()
        counts = torch.stack([pending.tensors()[-2].double() for *_, pending in asked])
        dist.all_reduce(counts, group=self._group)
        pairs = zip(asked, counts.tolist(), strict=True)
        return {(layer, key) for (layer, key, _), n in pairs if n > 0}

    def _averaged(self) -> int:
        """How many losses the gradients are an average of: tensor parallelism shares one."""
        mesh = self._tensor_parallel
        return 1 if self._summed else self._world // (1 if mesh is None else mesh.size())
