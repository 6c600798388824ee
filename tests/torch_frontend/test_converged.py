"""A network that fits all its data goes on to fit them, however long it is trained."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from singd_torch import SINGD

EXAMPLES, BATCH, STEPS = 300, 64, 1200


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_stays_where_it_is(seed: int) -> None:
    """Gradients that vanish agree, and longer steps would carry the weights away."""
    torch.manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.images[:EXAMPLES] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target[:EXAMPLES])
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer, losses = SINGD(model), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(EXAMPLES, (BATCH,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert max(losses[STEPS // 3 :]) < 1e-3
