"""Sums of rows that leave for the owners of their layers while a backward pass runs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_torch._distributed import another, apart, device_of_flags
from singd_torch.layers.layer import Key, Layer
from singd_torch.layers.pending import Pending

Entry: TypeAlias = tuple[Layer, Key, Pending]
Place: TypeAlias = tuple[nn.Parameter, Key]

# Sums of so many bytes leave together.
BUCKET = 25 << 20

# What became of a layer's rows after their sums had left: nothing, there were more, or they do not
# count any more.
KEPT, MORE, VOID = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """Sums of layers that one process owns, or that all have, in a row."""

    owner: int | None
    entries: Sequence[Entry]
    numbers: Tensor

    def send(self, group: Any, *, wait: bool) -> Any:
        """Sum the numbers where they are wanted; all processes of the group call it."""
        if self.owner is None:
            return dist.all_reduce(self.numbers, group=group, async_op=not wait)
        root = dist.get_global_rank(group, self.owner)
        return dist.reduce(self.numbers, root, group=group, async_op=not wait)

    def is_for(self, rank: int) -> bool:
        """Whether a process is to have the sums."""
        return self.owner is None or self.owner == rank

    def read(self) -> dict[Place, list[Tensor]]:
        """The sums by weight and key, in the order of `Pending.tensors`."""
        found: dict[Place, list[Tensor]] = {}
        start = 0
        for layer, key, pending in self.entries:
            own = found[layer.weight, key] = []
            for t in pending.tensors():
                end = start + t.numel()
                own.append(self.numbers[start:end].reshape(t.shape).to(t.dtype))
                start = end
        return found


class Stream:
    """Sends the sums of layers in buckets, each as soon as all of its layers have had their rows.

    The buckets and their order are those in which a backward pass of the first process had rows.
    All processes send all of them once in each step with a refresh, whichever rows they have and
    whatever they have met since they last agreed: what has not left when the step begins leaves
    then. So they wait for each other in steps alone.
    """

    def __init__(
        self, group: dist.ProcessGroup, flats: Callable[[Iterable[Entry]], list[Flat]]
    ) -> None:
        """`flats` is what this process adds to the sums of entries."""
        self._group, self._flats = group, flats
        self._rank = dist.get_rank(group)
        self._own_group: Any = None  # lest its calls wait behind the calls of `fully_shard`
        self._known: dict[nn.Parameter, list[Key]] = {}  # all know of them before the step
        self._plans: dict[Hashable, list[list[Layer]]] = {}
        self._wanted: dict[nn.Parameter, int] = {}
        self._begin()

    def _begin(self) -> None:
        self._buckets: list[list[Layer]] | None = None
        self._next = 0
        self._flying: list[tuple[Any, Flat]] = []
        self._calls: Counter[nn.Parameter] = Counter()
        self._order: dict[nn.Parameter, int] = {}
        self._left: dict[Place, Pending | None] = {}
        self._before: dict[Place, tuple[Layer, Pending]] = {}  # what has left, as it was here
        self._void: set[nn.Parameter] = set()
        self._sums: dict[Place, list[Tensor]] = {}

    def forget(self) -> None:
        """Begin anew after a step; before one, what was sent does not count."""
        if self._next == 0:
            self._begin()
            return
        self._calls.clear()
        self._order.clear()
        self._before.clear()
        self._void |= {weight for weight, _ in self._left}

    def rearrange(self, due: Iterable[Layer], flags: Mapping[nn.Parameter, int]) -> None:
        """Have no buckets: the layers are others now. What was sent stays.

        All processes call it as `sent`, with the layers that were due so far.
        """
        self._finish(due, flags)
        self._known, self._plans, self._wanted, self._buckets = {}, {}, {}, None

    # ---- in a backward pass ---------------------------------------------------------------------

    def took(
        self, layer: Layer, due: Callable[[], Iterable[Layer]], measure: Callable[[], None]
    ) -> None:
        """A call has brought rows of a layer, one of those that are `due`.

        `measure` makes sums of the rows that wait.
        """
        if self._buckets is None and self._plans:
            self._buckets = self._plan(due())
        self._calls[layer.weight] += 1
        self._order[layer.weight] = self._calls.total()
        if self._is_ready():
            measure()
        while self._is_ready():
            self._launch({})

    def dropped(self, layer: Layer) -> None:
        """The rows that a layer has had so far do not count."""
        del self._calls[layer.weight]
        left = [place for place in self._left if place[0] is layer.weight]
        if left:
            self._void.add(layer.weight)
        for place in left:
            self._before.pop(place, None)

    def _is_ready(self) -> bool:
        buckets = self._buckets or ()
        return self._next < len(buckets) and all(
            self._calls[layer.weight] >= self._wanted.get(layer.weight, 1)
            for layer in buckets[self._next]
        )

    def _launch(self, flags: Mapping[nn.Parameter, int]) -> None:
        """Send the next bucket; rows of layers whose sums are void stay for the step."""
        assert self._buckets is not None
        entries: list[Entry] = []
        for layer in self._buckets[self._next]:
            for key in self._known[layer.weight]:
                pending = layer.pending.get(key)
                self._left[layer.weight, key] = None
                if pending is not None and flags.get(layer.weight) != VOID:
                    entries.append((layer, key, pending))
                    self._before[layer.weight, key] = layer, pending
                    layer.pending[key] = self._left[layer.weight, key] = pending.sent()
                else:
                    entries.append((layer, key, layer.no_rows(key)))
        self._next += 1
        for flat in self._flats(entries):
            self._flying.append((flat.send(self._own_group, wait=False), flat))
        self._flying = [
            (work, flat)
            for work, flat in self._flying
            if flat.is_for(self._rank) or not work.is_completed()
        ]

    # ---- in a step ------------------------------------------------------------------------------

    def flag(self, layer: Layer) -> int:
        """What became of the rows of a layer after they had left this process."""
        if layer.weight in self._void:
            return VOID
        left = {key: own for (weight, key), own in self._left.items() if weight is layer.weight}
        more = any(own is not left.get(key) for key, own in layer.pending.items())
        return MORE if left and more else KEPT

    def sent(
        self, due: Sequence[Layer], flags: Mapping[nn.Parameter, int]
    ) -> dict[Place, list[Tensor]]:
        """What all have sent and still counts; empty lists for what is another's.

        All processes call it in a step with the same layers and `flags`, the largest of all.
        """
        self._finish(due, flags)
        for (weight, key), (layer, pending) in self._before.items():
            # another process has dropped rows of its own; rows may have been lost here since
            if flags.get(weight) == VOID and key in layer.pending:
                later = layer.pending.pop(key)
                layer.add(key, pending)
                if later is not self._left[weight, key]:
                    layer.add(key, later)
        self._wanted |= self._calls
        return {
            place: self._sums.get(place, []) for place in self._left if flags.get(place[0]) != VOID
        }

    def _finish(self, due: Iterable[Layer], flags: Mapping[nn.Parameter, int]) -> None:
        """Send all that has not left, and wait for what is on its way."""
        if self._buckets is None:
            self._buckets = self._plan(due)
        while self._next < len(self._buckets or ()):
            self._launch(flags)
        self._next = 0
        for work, flat in self._flying:
            work.wait()
            if flat.is_for(self._rank):
                self._sums |= flat.read()
        self._flying, self._buckets = [], []

    def learn(self, due: Sequence[Layer]) -> None:
        """Make buckets for steps in which the same layers are due, unless there are some.

        All processes call it at the end of a step.
        """
        layers = [layer for layer in due if layer.rows_seen]
        self._known |= {layer.weight: layer.roles() for layer in layers}
        likeness = self._likeness(layers)
        if likeness in self._plans or not layers:
            return
        if self._own_group is None:
            self._own_group = another(self._group)
        device = device_of_flags(self._group, layers[0].weight.device)
        last = self._calls.total() + 1
        when = torch.tensor([self._order.get(one.weight, last) for one in layers], device=device)
        first = dist.get_global_rank(self._group, 0)
        dist.broadcast(when, first, group=apart(self._group))
        self._plans[likeness] = [[]]
        size = 0
        for i in when.argsort(stable=True).tolist():
            if size >= BUCKET:
                self._plans[likeness].append([])
                size = 0
            self._plans[likeness][-1].append(layers[i])
            size += bytes_of_sums(layers[i])

    def _plan(self, due: Iterable[Layer]) -> list[list[Layer]]:
        """The buckets of a step in which these layers are due, as far as they were known before."""
        return self._plans.get(self._likeness(due), [])

    def _likeness(self, due: Iterable[Layer]) -> Hashable:
        """What steps have in common whose sums leave alike."""
        known = self._known
        return tuple((one.weight, *known[one.weight]) for one in due if one.weight in known)


def bytes_of_sums(layer: Layer) -> int:
    """What a process sends of a layer at a refresh."""
    batch, d_out, d_in = layer.shape
    pairs = zip(layer.structures, (d_in, d_out), strict=True)
    each = sum(structure.sums().numbers(d) for structure, d in pairs)
    roles = {swapped for _, swapped in layer.roles()}
    return each * math.prod(batch) * len(roles) * max(4, layer.weight.dtype.itemsize)
