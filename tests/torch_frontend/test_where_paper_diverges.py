"""What docs/settings.md says of where the recipe "paper" diverges, and of what helps."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from singd_torch import SINGD

datasets = pytest.importorskip("sklearn.datasets")

PAPER: dict[str, Any] = {"recipe": "paper"}


def trained(inputs: float = 1.0, loss: float = 1.0, **given: Any) -> tuple[float, float]:
    """The loss before and after 200 steps on digits, whose pixels go from 0 to `inputs`."""
    digits = datasets.load_digits()
    X = torch.tensor(digits.data, dtype=torch.float32) / 16 * inputs
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, g = SINGD(model, **given), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(X), y).item()
    for _ in range(200):
        rows = torch.randint(len(X), (64,), generator=g)
        optimizer.zero_grad()
        (loss * nn.functional.cross_entropy(model(X[rows]), y[rows])).backward()
        optimizer.step()
    with torch.no_grad():
        return before, nn.functional.cross_entropy(model(X), y).item()


DIVERGES: dict[str, dict[str, Any]] = {
    "inputs to 255": {"inputs": 255.0},
    "a loss multiplied by 100": {"loss": 100.0},
    "a large lr_cov": {"lr_cov": 0.5},
    "a small damping": {"damping": 1e-5, "T": 1, "lr_cov": 0.1},
}
TRAINS: dict[str, dict[str, Any]] = {
    "inputs to 1": PAPER,
    "inputs to 16": PAPER | {"inputs": 16.0},
    "inputs to 255, normalize_lr_cov": PAPER | {"inputs": 255.0, "normalize_lr_cov": True},
    "inputs to 255, a small lr_cov": PAPER | {"inputs": 255.0, "lr_cov": 1e-3},
    "a loss times 100, normalize_lr_cov": PAPER | {"loss": 100.0, "normalize_lr_cov": True},
    "a smaller lr_cov": PAPER | {"lr_cov": 0.1},
    "a larger damping": PAPER | {"damping": 1e-3, "T": 1, "lr_cov": 0.1},
    "the default, inputs to 255": {"inputs": 255.0},
    "the default, a loss times 100": {"loss": 100.0},
}


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize("case", DIVERGES)
def test_paper_diverges(case: str) -> None:
    before, after = trained(**PAPER, **DIVERGES[case])
    assert not after < 100 * before


@pytest.mark.parametrize("case", TRAINS)
def test_a_remedy_trains(case: str) -> None:
    before, after = trained(**TRAINS[case])
    assert after < before


def test_the_default_does_not_depend_on_what_the_loss_is_multiplied_by() -> None:
    _, once = trained()
    _, often = trained(loss=128.0)  # a power of two rounds nothing
    assert math.isclose(once, often, rel_tol=1e-5)
