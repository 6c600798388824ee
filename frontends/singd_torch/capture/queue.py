"""Small calls of layers, which are measured together with equal ones: one product for all."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core.rules import Factors
from singd_torch.layers.layer import Key, Layer
from singd_torch.layers.pending import Pending, Rows
from singd_torch.layers.rows import SMALL
from singd_torch.tensors.pieces import on_host, piece_size, transforms

# In numbers: what waits is held for a while.
_MOST = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The rows of one use of a layer's weight, and the factors that measure them.

    Attributes:
        layer: The layer.
        key: The part of its weight, and its role.
        rows: The rows.
        factors: What measures them.
        backward: The number of the backward pass.
        stream: The stream of CUDA that makes the rows.
    """

    layer: Layer
    key: Key
    rows: Rows
    factors: Factors
    backward: int
    stream: Any = None

    @property
    def numbers(self) -> int:
        """The size of the rows."""
        return self.rows.A.numel() + self.rows.B.numel()

    def pieces(self) -> list[Call]:
        """The call as several of fewer rows, where products with a factor are transforms."""
        A, B = self.rows.A, self.rows.B
        n = -(-self.numbers // piece_size(*self.layer.structures))
        short = min(A.shape[-2], B.shape[-2]) < n
        if short or not transforms(*self.layer.structures) or not (on_host(A) and on_host(B)):
            return [self]
        counts = [self.rows.N] + [0] * (n - 1)
        pieces = zip(A.tensor_split(n, -2), counts, B.tensor_split(n, -2), strict=True)
        return [dataclasses.replace(self, rows=Rows(*piece, self.rows.M)) for piece in pieces]

    @property
    def likeness(self) -> Hashable:
        """What calls have in common that can be measured as one."""
        A, B, layer = self.rows.A, self.rows.B, self.layer
        own = type(self.factors), layer.structures, layer.dtypes, layer.autocast, self.key[1]
        where = A.device, layer.weight.device, self.stream
        return *own, A.shape, B.shape, A.dtype, B.dtype, *where


class Queue:
    """The calls that wait. A backward pass has a thread for each device, and all take calls."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls: list[Call] = []
        self._numbers = 0

    def take(self, call: Call, lent: Sequence[Tensor]) -> None:
        """Measure a call, now or with others that come soon, when the `lent` may have changed."""
        with self._lock:
            if self._calls and call.backward != self._calls[0].backward:
                self.flush()  # pending rows count the losses of one backward pass after the other
            if call.numbers > SMALL:
                for piece in call.pieces():
                    _measure([piece])
                return
            stream = torch.cuda.current_stream(call.rows.A.device) if call.rows.A.is_cuda else None
            rows = call.rows.kept(lent)
            self._calls.append(dataclasses.replace(call, rows=rows, stream=stream))
            self._numbers += call.numbers
            if self._numbers > _MOST:
                self.flush()

    def flush(self) -> None:
        """Measure all calls that wait."""
        with self._lock:
            alike: dict[Hashable, list[Call]] = {}
            for call in self._calls:
                alike.setdefault(call.likeness, []).append(call)
            self.forget()
            for calls in alike.values():  # in the order of the stacks, lest their factors be copied
                with _on(calls[0].stream):
                    _measure(sorted(calls, key=_place))

    def forget(self, layer: Layer | None = None) -> None:
        """Drop the calls that wait, or only the calls of one layer."""
        with self._lock:
            others = [call for call in self._calls if call.layer is not layer]
            self._calls = [] if layer is None else others
            self._numbers = sum(call.numbers for call in self._calls)


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """On this stream of CUDA, which the current one waits for at the end; None is the current."""
    if stream is None or (now := torch.cuda.current_stream(stream.device)) == stream:
        yield
        return
    with torch.cuda.stream(stream):
        yield
    now.wait_stream(stream)


def _place(call: Call) -> int:
    """Where the factors are, in memory that equal layers share."""
    _, first = next(call.factors.named_arrays())
    offset: int = first.storage_offset()
    return offset


def _measure(calls: list[Call]) -> None:
    first, factors, rows = calls[0], [call.factors for call in calls], [call.rows for call in calls]
    given = {"swapped": first.key[1], "autocast": first.layer.autocast}
    found = Pending.measured(factors, rows, first.backward, **given)
    for call, new in zip(calls, found, strict=True):
        call.layer.add(call.key, new)
