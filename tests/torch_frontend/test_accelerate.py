"""Accelerate: what it prepares trains, resumes, and clips and accumulates as without it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watched import STEPS, check_trained, layers

from singd_torch import SINGD

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_shared_state() -> Iterator[None]:
    """All accelerators of a process share the settings of the first."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def rows() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=draw)
    return TensorDataset(x, torch.randint(3, (32,), generator=draw))


class Run:
    """A model, its optimizer and data, prepared by an accelerator."""

    def __init__(self, model: nn.Module, batch: int = 32, **given: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **given)
        self.singd = SINGD(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.singd, 2 * STEPS)
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, self.singd, DataLoader(rows(), batch_size=batch), schedule
        )

    def train(self, epochs: int, clip: float | None = None) -> list[float]:
        losses = []
        for _ in range(epochs):
            for x, y in self.data:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(x), y)
                    self.accelerator.backward(loss)
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_accelerate_prepares_trains(precision: str) -> None:
    model = network()
    start, run = copy.deepcopy(model), Run(model, mixed_precision=precision)
    losses = run.train(STEPS, clip=0.5)
    assert [layer.name for layer in layers(run.singd)] == ["0.weight", "3.weight"]
    check_trained(model, start, run.singd, losses)


def test_batches_that_accelerate_accumulates_are_one_large_batch() -> None:
    parts = network()
    whole = copy.deepcopy(parts)
    Run(parts, batch=8, gradient_accumulation_steps=4).train(4)
    Run(whole).train(4)
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        # the rounding of float32, through four steps
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_run_resumed_from_a_state_of_accelerate_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model, resumed = network(), network()
    run = Run(model)
    run.train(STEPS // 2)
    run.accelerator.save_state(str(tmp_path))
    run.train(STEPS // 2)
    again = Run(resumed)
    again.accelerator.load_state(str(tmp_path))
    again.train(STEPS // 2)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
