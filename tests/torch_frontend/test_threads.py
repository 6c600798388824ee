"""Autograd has a thread for each device, and all of them hand rows to the same queue."""

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
