"""Losses that contain derivatives of the model: SINGD as it is against AdamW at its best rate.

Equal steps, the same batches, and a linear decay of the rate to zero for both.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD

RATES = 0.003, 0.01, 0.03, 0.1
SEEDS = range(5)

Make = Callable[[nn.Module], torch.optim.Optimizer]
Loss = Callable[[nn.Module, torch.Generator], Tensor]


def derivative(z: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(z.sum(), x, create_graph=True)[0]


def burgers(model: nn.Module, draw: torch.Generator) -> Tensor:
    """u_t + u u_x = 0.01/π u_xx, u(0, x) = −sin πx, u(t, ±1) = 0 (arXiv 1711.10561)."""
    t = torch.rand(128, 1, generator=draw).requires_grad_()
    x = (2 * torch.rand(128, 1, generator=draw) - 1).requires_grad_()
    u = model(torch.cat([t, x], 1))
    u_x = derivative(u, x)
    residual = derivative(u, t) + u * u_x - 0.01 / math.pi * derivative(u_x, x)
    at_start = 2 * torch.rand(64, 1, generator=draw) - 1
    begin = model(torch.cat([torch.zeros_like(at_start), at_start], 1))
    wall = torch.sign(torch.rand(64, 1, generator=draw) - 0.5)
    edge = model(torch.cat([torch.rand(64, 1, generator=draw), wall], 1))
    start = begin + torch.sin(math.pi * at_start)
    return residual.square().mean() + start.square().mean() + edge.square().mean()


def critic(model: nn.Module, draw: torch.Generator) -> Tensor:
    """The loss of a critic with gradient penalty (arXiv 1704.00028), two clusters against one."""
    side = torch.sign(torch.rand(64, 1, generator=draw) - 0.5)
    real = 0.5 * torch.randn(64, 2, generator=draw) + torch.tensor([2.0, 0.0]) * side
    fake = torch.randn(64, 2, generator=draw)
    share = torch.rand(64, 1, generator=draw)
    between = (share * real + (1 - share) * fake).requires_grad_()
    slope = derivative(model(between), between).norm(dim=1)
    return model(fake).mean() - model(real).mean() + 10 * (slope - 1).square().mean()


def network(activation: type[nn.Module], *widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


TASKS: dict[str, tuple[Loss, Callable[[], nn.Module], int]] = {
    "Burgers": (burgers, lambda: network(nn.Tanh, 2, 20, 20, 20, 1), 600),
    "WGAN-GP": (critic, lambda: network(nn.ReLU, 2, 32, 32, 1), 300),
}


def final_losses(task: str, make: Make) -> Tensor:
    """The mean loss of 50 batches after training, for each seed."""
    loss, build, steps = TASKS[task]
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, draw = build(), torch.Generator().manual_seed(seed + 100)
        optimizer = make(model)
        decay: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, draw).backward()
            optimizer.step()
            decay.step()
        found.append(sum(loss(model, draw).item() for _ in range(50)) / 50)
    return torch.tensor(found)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_no_worse_than_adamw_at_its_best_rate(task: str) -> None:
    def adamw(lr: float) -> Make:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)

    best = min((final_losses(task, adamw(lr)) for lr in RATES), key=torch.mean)
    worse = final_losses(task, SINGD) - best
    # on the same batches, so that the differences between seeds have the error
    assert worse.mean() <= worse.std() / len(SEEDS) ** 0.5
