"""With the default recipe no step of any structure makes NaN, at any scale or rate."""

import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from singd_core import structures
from singd_torch import SINGD

SCALES = [0.01, 1.0, 30.0, 1000.0]
RATES = [0.001, 0.01, 0.1, 1.0]
STEPS, BATCH = 100, 64

# Parameters for the structures that want some; the others are as their names say.
PARAMETERS = {"blockdiagonal": ":8", "hierarchical": ":4,4"}
NAMES = [name.partition("[")[0].partition(":")[0] for name in structures.names()]
STRUCTURES = [name + PARAMETERS.get(name, "") for name in NAMES]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0, torch.tensor(y)


def failure(model: nn.Module, optimizer: SINGD, x: Tensor, y: Tensor) -> str:
    """What went wrong in 100 steps, or nothing."""
    with_bad_gradients = 0
    for step in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]).float(), y[chosen]).backward()
        with_bad_gradients += not all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        if optimizer.skipped > with_bad_gradients:
            return f"step {step} was skipped, though its gradients are finite"
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        return f"not finite: {bad}"
    return f"{with_bad_gradients} gradients are not finite" if with_bad_gradients else ""


@pytest.mark.slow
@pytest.mark.parametrize("network", [mlp, cnn], ids=lambda network: network.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_nan_at_any_scale_and_rate(structure: str, dtype: torch.dtype, network) -> None:
    images, labels = digits()
    failures = {}
    for scale in SCALES:
        for rate in RATES:
            torch.manual_seed(0)
            model = network().to(dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*NaN or infinite|.*the size of a step")
                optimizer = SINGD(model, lr=rate, structures=(structure, structure))
                found = failure(model, optimizer, (images * scale).to(dtype), labels)
            if found:
                failures[scale, rate] = found
    assert not failures, "\n".join(f"scale {s}, rate {r}: {f}" for (s, r), f in failures.items())
