"""Autograd has a thread for each device, and scripts have threads: all hand on rows."""

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from singd_torch import SINGD
from singd_torch.capture import queue
from singd_torch.layers.pending import Rows


def test_no_rows_are_lost_or_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, measured = 1000, list[Any]()
    monkeypatch.setattr(queue, "_MOST", 1000)
    monkeypatch.setattr(queue, "_measure", measured.extend)
    optimizer = SINGD(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))))
    waiting, layers = queue.Queue(), optimizer._layers

    def hand_on(layer: Any) -> None:
        rows, factors = Rows(torch.zeros(2, 4), 2, torch.zeros(2, 3), 2), layer.first_factors()
        for _ in range(calls):
            waiting.take(queue.Call(layer, (None, False), rows, factors, 0), lent=())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hand_on, args=(layer,)) for layer in layers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    waiting.flush()
    assert len(measured) == len(set(map(id, measured))) == calls * len(layers)


def test_micro_batches_in_threads_are_one_large_batch() -> None:
    """Their backward passes run at the same time."""
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model)
    together, alone = (SINGD(one, T=1, growing_T=False) for one in (model, twin))
    parts = [slice(0, 8), slice(8, 20), slice(20, 32)]
    meet = threading.Barrier(len(parts), timeout=60)
    for layer in (model[0], model[2]):  # no gradient is there before all have rows
        layer.weight.register_hook(lambda _: (meet.wait(), None)[1])

    def backward(model: nn.Module, part: slice) -> None:
        loss = nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum")
        (loss / len(x)).backward()

    for _ in range(3):
        together.zero_grad()
        threads = [threading.Thread(target=backward, args=(model, part)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together.step()
        alone.zero_grad()
        backward(twin, slice(None))
        alone.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
