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


def residual(side: int = 64) -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(side, side), nn.ReLU(), nn.Linear(side, side))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x + self.inner(x)
            return y

    return nn.Sequential(
        nn.Linear(side, side), *(Residual() for _ in range(3)), nn.Linear(side, 10)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_examples_that_are_fitted_at_once_stay_fitted(seed: int) -> None:
    """The momentum is of the first gradients for long, and longer steps would follow it away."""
    torch.manual_seed(seed)
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    model = residual()
    optimizer, losses = SINGD(model), []
    for _ in range(70):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[15:]) < 1e-3
