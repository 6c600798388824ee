"""Weights in 16 bits: how they are stored after a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._settings import Settings
from singd_core.rounding import (
    WHOLE,
    Format,
    Place,
    Rounding,
    bits_at,
    format_of,
    identity,
    is_rounded,
    nearest,
    random_bits,
    stochastic,
)
from singd_core.step import new_weight
from singd_torch._groups import settings_of
from singd_torch._state import begin_cost
from singd_torch.tensors.pieces import cut, on_host

# In numbers: the bits of so many stay in the cache of a processor, and take little memory of an
# accelerator.
_PIECE = 1 << 16
_PIECES = 1 << 22


def owners(names: Sequence[str], like: Tensor) -> Tensor:
    """The numbers of names, on a device, which the host does not wait for."""
    numbers = torch.tensor([identity(name) for name in names], dtype=torch.int32, device="cpu")
    return numbers.to(like.device, non_blocking=True)


def compensations(
    place: Sequence[nn.Parameter], s: Settings, state: MutableMapping[Any, dict[str, Any]]
) -> Sequence[Tensor] | None:
    """What rounding has cost parameters so far, None unless that is kept."""
    found = [begin_cost(p, s, state) for p in place]
    return [cost for cost in found if cost is not None] or None


def round_to(
    weight: Tensor,
    u: Tensor,
    c: Any,
    s: Settings,
    rounding: Rounding,
    name: str,
    lost: Sequence[Tensor] | None,
    moves: Tensor | None,
    place: Place = WHOLE,
) -> None:
    """Change a weight of 16 bits, or several along a first axis.

    Args:
        weight: The weight or bias, or all weights or biases of a stack.
        u: Its direction.
        c: The scale of that.
        s: The settings.
        rounding: How it is stored.
        name: "weight" or "bias".
        lost: What rounding has cost each weight so far, None unless that is kept.
        moves: On an accelerator, whether they move, 0-d.
        place: Where a weight stands that is a part of one.
    """
    several = isinstance(rounding.owner, Tensor)
    at_once = several or place.strides is not None
    before = None if lost is None else torch.stack(tuple(lost)) if several else lost[0]
    pieces = [[x] if at_once else cut(x, _PIECE) for x in (weight, u)]
    costs: Iterable[Any] = itertools.repeat(None)
    if before is not None:
        costs = [before] if at_once else cut(before, _PIECE)
    for piece, change, cost in zip(*pieces, costs, strict=False):
        new, now = new_weight(change, c, piece, s, rounding, name, place, cost)
        place = place if at_once else Place(place.start + piece.numel())
        if now is None:  # what does not move has its dtype already, and stays
            piece.copy_(new)
            continue
        for into, value in ((piece, new), (cost, now)):
            into.copy_(value if moves is None else torch.where(moves, value.to(into), into))
    if several and lost is not None and before is not None:
        torch._foreach_copy_(list(lost), before.unbind(0))


class Row:
    """Parameters of 16 bits that are stored together: few calls for many small ones.

    Attributes:
        params: The parameters, of one dtype and on one device.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        roles: Sequence[str],
        places: Sequence[Place],
    ) -> None:
        """What they are.

        Args:
            params: The parameters.
            names: The names of the layers that they belong to.
            roles: Which of their arrays they are; equal ones are neighbours.
            places: Where they stand in the whole parameters.
        """
        self.params, self._places = params, places
        self._roles = [role for role, _ in itertools.groupby(roles)]
        counts = [len([*own]) for _, own in itertools.groupby(roles)]
        self._owners = torch.split(owners(names, params[0]), counts)
        self._shifts: dict[int, Sequence[Tensor]] = {}

    def write(
        self,
        x: Tensor,
        s: Settings,
        step: int,
        lost: Sequence[Tensor] | None,
        moves: Tensor | None,
    ) -> None:
        """Round what the parameters are to be and write it to them.

        Args:
            x: Their numbers, flat and in float32; it may be overwritten.
            s: The settings.
            step: The number of steps taken.
            lost: What rounding has cost each so far, None unless that is kept.
            moves: On an accelerator, whether they move, 0-d.
        """
        if lost is not None:
            self._compensate(x, lost, moves)
            return
        sizes, known = [p.numel() for p in self.params], format_of(self.params[0].dtype)
        assert known is not None
        keys = [
            Rounding.at(s.seed, step, own, {}).key(role)
            for role, own in zip(self._roles, self._owners, strict=True)
        ]
        self._round(x, sizes, torch.cat(keys), known)
        each = zip(torch.split(x, sizes), self.params, strict=True)
        torch._foreach_copy_(list(self.params), [own.view(p.shape) for own, p in each])

    def _compensate(self, x: Tensor, lost: Sequence[Tensor], moves: Tensor | None) -> None:
        sizes = [p.numel() for p in self.params]
        x += torch.cat([cost.reshape(-1) for cost in lost])
        dtype = self.params[0].dtype
        known = format_of(dtype)
        assert known is not None
        new = nearest(x, known)
        for places, values in ((self.params, new), (lost, x - new)):
            for place, value in zip(places, torch.split(values.to(dtype), sizes), strict=True):
                value = value.view(place.shape)
                place.copy_(value if moves is None else torch.where(moves, value, place))

    def _round(self, x: Tensor, sizes: Sequence[int], keys: Tensor, known: Format) -> None:
        most, end = _PIECE if on_host(x) else _PIECES, 0
        for run in self._runs(sizes, most):
            first, start, end = run.start, end, end + sum(sizes[run])
            some, place = x[start:end], self._places[first]
            if run.stop - first > 1:
                some.copy_(stochastic(some, self._bits(run, sizes[run], keys[run]), known))
            elif place.strides is not None:
                some = some.view(self.params[first].shape)
                some.copy_(stochastic(some, random_bits(keys[first], some, place), known))
            else:
                for piece in torch.split(some, most):
                    bits = random_bits(keys[first], piece, place)
                    piece.copy_(stochastic(piece, bits, known))
                    place = Place(place.start + piece.numel())

    def _runs(self, sizes: Sequence[int], most: int) -> Iterator[slice]:
        """Neighbours of together at most so many numbers, all of them contiguous."""
        start = total = 0
        for i, (n, place) in enumerate(zip(sizes, self._places, strict=True)):
            n = n if place.strides is None else most + 1
            if i > start and total + n > most:
                yield slice(start, i)
                start, total = i, 0
            total += n
        yield slice(start, len(sizes))

    def _bits(self, run: slice, sizes: Sequence[int], keys: Tensor) -> Tensor:
        """The random bits of neighbours."""
        total, known = sum(sizes), self._shifts.get(run.start)
        if known is None:
            ends = itertools.accumulate(sizes)
            of_each = zip(self._places[run], ends, sizes, strict=True)
            shifts = [place.start - end + n for place, end, n in of_each]
            known = self._shifts[run.start] = [
                torch.tensor(each, dtype=dtype, device="cpu").to(keys.device, non_blocking=True)
                for each, dtype in ((sizes, torch.int64), (shifts, torch.int32))
            ]
        key, shift = (
            torch.repeat_interleave(each, known[0], output_size=total) for each in (keys, known[1])
        )
        positions = torch.arange(total, dtype=torch.int32, device=keys.device) + shift
        bits: Tensor = bits_at(positions, key)
        return bits


def store(
    params: Sequence[nn.Parameter],
    wide: Sequence[Tensor],
    group: dict[str, Any],
    *,
    names: Mapping[nn.Parameter, str],
    places: Mapping[nn.Parameter, Place],
    rows: MutableMapping[Any, Row],
    state: MutableMapping[Any, dict[str, Any]],
    skip: Tensor | None,
) -> None:
    """Write to parameters of 16 bits what their copies in float32 have become.

    Args:
        params: Parameters of a group.
        wide: Their copies; those that are parameters themselves are no copies.
        group: The group.
        names: The names of parameters.
        places: Where those stand that are parts.
        rows: The parameters that are stored together, kept from step to step.
        state: The state.
        skip: On an accelerator, 1 where nothing may change, else 0.
    """
    s, found = settings_of(group), dict[Any, list[tuple[nn.Parameter, Tensor]]]()
    for p, x in zip(params, wide, strict=True):
        if x is not p:
            found.setdefault((id(group), p.dtype, p.device), []).append((p, x))
    for key, pairs in found.items():
        own: list[Any] = [p for p, _ in pairs]
        if not is_rounded(s.rounding, [own[0].dtype]):
            torch._foreach_copy_(own, [x for _, x in pairs])
            continue
        row = rows.get(key)
        if row is None or len(row.params) != len(own) or any(map(is_not, row.params, own)):
            called = [names.get(p, "") for p in own]
            roles = ["weight"] * len(own)
            row = rows[key] = Row(own, called, roles, [places.get(p, WHOLE) for p in own])
        x = torch.cat([x.reshape(-1) for _, x in pairs])
        moves = None if skip is None else skip.to(x.device) == 0.0
        row.write(x, s, group["steps"], compensations(own, s, state), moves)
