"""What a training step costs: seconds, bytes, and calls of aten operations."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

_OUTSIDE, _STEP, _END = "bench: outside", "bench: step", "bench: end"


@dataclasses.dataclass
class Trainee:
    """A model in training on one batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    def differentiate(self) -> None:
        """Forward and backward, with the hooks of the optimizer."""
        self.optimizer.zero_grad()
        self.loss(self.model(self.x), self.y).backward()

    def lasting(self) -> int:
        """Bytes of the parameters, the buffers and the batch."""
        tensors = (*self.model.parameters(), *self.model.buffers(), self.x, self.y)
        return sum(_bytes(t) for t in tensors)


def _bytes(t: Tensor) -> int:
    return t.nbytes if t.layout is torch.strided else t.indices().nbytes + t.values().nbytes


def seconds(trainee: Trainee, device: torch.device) -> tuple[float, float]:
    """The times of forward and backward, and of `step`: of the clock, or of events on CUDA."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        marks[0].record()
        trainee.differentiate()
        marks[1].record()
        trainee.optimizer.step()
        marks[2].record()
        torch.cuda.synchronize(device)
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
    start = time.perf_counter()
    trainee.differentiate()
    middle = time.perf_counter()
    trainee.optimizer.step()
    return middle - start, time.perf_counter() - middle


# ---- operations and memory ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What the first steps of a training took.

    Attributes:
        calls: Of each step, the aten calls of forward and backward, and of `step`, as
            torch.profiler counts them: with those that operations make themselves.
        state: Bytes that are allocated between steps, without parameters, buffers and batch.
        peak: The most bytes that were allocated during a step, all included.
    """

    calls: list[tuple[int, int]]
    state: int
    peak: int


def anatomy(
    build: Callable[[], Trainee], enough: Callable[[int, float], bool], device: torch.device
) -> Anatomy:
    """Count operations and bytes of the first steps.

    On the CPU, torch's allocator reports to the profiler. It reports the end of a block only if it
    reported its beginning, so the model is built under the profiler too. What libraries allocate by
    themselves, as oneDNN does for scratch, is not seen. On CUDA, torch's allocator is asked.

    Args:
        build: Makes model, optimizer and batch.
        enough: Given the number of steps taken and their seconds, whether to stop.
        device: Where `build` puts them.
    """
    cuda = device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=not cuda) as profiler:
        trainee = build()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        steps, start = 0, time.perf_counter()
        while not enough(steps, time.perf_counter() - start):
            with record_function(_OUTSIDE):
                trainee.differentiate()
            with record_function(_STEP):
                trainee.optimizer.step()
            steps += 1
        trainee.optimizer.zero_grad()
        gc.collect()
        with record_function(_END):
            pass
    calls, left, peak = _read(profiler)
    if cuda:
        left = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
    return Anatomy(calls, left - trainee.lasting(), peak)


def _read(profiler: profile) -> tuple[list[tuple[int, int]], int, int]:
    """The calls of each step, the bytes left at the end, and the most during the steps."""
    events = profiler.profiler.kineto_results.events()  # the public ones have no running total
    calls: list[list[int]] = []
    now = total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif name == _OUTSIDE:
            if not calls:
                peak = total  # forget what building took
            calls.append([0, 0])
            now = 0
        elif name == _STEP:
            now = 1
        elif name == _END:
            break
        elif name.startswith("aten::") and calls:
            calls[-1][now] += 1
    return [(outside, inside) for outside, inside in calls], total, peak
