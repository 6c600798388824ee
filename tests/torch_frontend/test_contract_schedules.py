"""Torch's schedules of the rate."""

import copy
import warnings
from typing import Any

import pytest
import torch
from contract_runs import Network, batch, moved, step
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from singd_torch import SINGD


def test_the_rate_of_the_fallback_follows_the_schedule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = SINGD(model, lr=0.2, warmup=0, fallback_lr=0.1, fallback_weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x = torch.randn(9, 4)
    for factor in (1.0, 0.5, 0.25):
        before = model[1].bias.detach().clone()
        optimizer.zero_grad()
        (model(x).sum(1) * torch.arange(9.0)).mean().backward()
        optimizer.step()
        schedule.step()
        # the bias' gradient is constant, so each of AdamW's steps is its rate
        change = (model[1].bias - before).abs()
        torch.testing.assert_close(change, torch.full((4,), 0.1 * factor), rtol=1e-4, atol=0)


@pytest.mark.parametrize("first", [1e-6, 0.0048, torch.tensor(0.0048), 0.2])
def test_the_rate_of_the_fallback_never_grows_beyond_it(first: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rate may be small
        optimizer = SINGD(model, lr=first, fallback_lr=0.1, fallback_weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.12, total_steps=12)
    x = torch.randn(9, 4)
    for _ in range(12):
        before = model[1].bias.detach().clone()
        optimizer.zero_grad()
        (model(x).sum(1) * torch.arange(9.0)).mean().backward()
        optimizer.step()
        schedule.step()
        # the bias' gradient is constant, so each of AdamW's steps is its rate
        assert (model[1].bias - before).abs().max() <= 0.1 * (1.0 + 1e-4)


def rates_of_the_norm(given: dict[str, Any], rates: list[float | None]) -> list[float]:
    """How far a norm and a layer move at each of these rates; None leaves the rate as it is."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)), []
    optimizer = SINGD(model, **given)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    for rate in rates:
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        before = copy.deepcopy(model)
        step(model, optimizer, (x, y))
        data += moved(model, before).values()
    return data


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_rate_of_zero_moves_nothing_and_a_schedule_may_begin_at_it(
    zero: Any, recipe: str
) -> None:
    still = rates_of_the_norm({"lr": zero, "recipe": recipe}, [None, None])
    assert max(still) == 0.0
    rates: list[float | None] = [0.0, 1e-3, 2e-2, 0.0, 1e-2]
    begun_at_zero = rates_of_the_norm({"lr": zero, "recipe": recipe}, [None, *rates[1:]])
    assert begun_at_zero == rates_of_the_norm({"recipe": recipe}, rates)
    assert max(begun_at_zero[-6:]) > 0.0


def test_a_first_step_of_rate_zero_is_a_step() -> None:
    model = Network()
    optimizer = SINGD(model, lr=0.0)
    step(model, optimizer, batch())
    assert optimizer.param_groups[0]["steps"] == 1
    layers = [p for p in model.parameters() if p.ndim > 1]
    assert all(optimizer.state[p]["averages.k"].eq(1.0).all() for p in layers)


def test_a_group_of_rate_zero_follows_the_rate_of_the_optimizer_when_it_rises() -> None:
    def change(of_norm: dict[str, Any]) -> float:
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        groups = [
            {"params": model[0].parameters()},
            {"params": model[1].parameters(), "fallback_weight_decay": 0.0, **of_norm},
        ]
        optimizer = SINGD(model, groups, lr=0.2, warmup=0, fallback_lr=0.1)
        optimizer.param_groups[1]["lr"] = 0.1
        model[1].bias.grad = torch.ones(4)
        optimizer.step()
        return model[1].bias.abs().max().item()

    assert change({"lr": 0.0}) == change({}) == pytest.approx(0.05, rel=1e-4)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=6),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.02, step_size_up=2),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_torch_work(schedule: str) -> None:
    model = Network()
    optimizer = SINGD(model)
    steps = SCHEDULES[schedule](optimizer)
    rates = set()
    for _ in range(5):
        step(model, optimizer)
        steps.step()
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1
    assert optimizer.skipped == 0


def test_plateau_schedule_works() -> None:
    model = Network()
    optimizer = SINGD(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        step(model, optimizer)
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.02


def test_a_rate_that_is_a_tensor_is_the_number_it_holds() -> None:
    model, data = Network(), [batch() for _ in range(4)]
    twin = copy.deepcopy(model)
    optimizers = SINGD(model, lr=torch.tensor(0.02)), SINGD(twin, lr=0.02)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
    for one in data:
        for net, optimizer, schedule in zip((model, twin), optimizers, schedules, strict=True):
            step(net, optimizer, one)
            schedule.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # 0.02 is rounded to float32 in one, and in float64 in the other
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


RATES: list[Any] = [
    torch.tensor(0.1, dtype=torch.bfloat16),
    torch.tensor(1),
    0.5,
    torch.tensor(2.0, dtype=torch.float64),
    torch.tensor(0.5, requires_grad=True),
    torch.tensor(1.0),
]


def test_the_largest_rate_is_known_whatever_rates_are_given_as() -> None:
    model = Network()
    optimizer = SINGD(model)
    (group,) = optimizer.param_groups
    for rate, largest in zip(RATES, [0.1, 1.0, 1.0, 2.0, 2.0, 2.0], strict=True):
        group["lr"], group["largest_lr"] = rate, 0.0 if rate is RATES[0] else group["largest_lr"]
        step(model, optimizer)
        assert float(group["largest_lr"]) == pytest.approx(largest, rel=1e-2)
        assert not getattr(group["largest_lr"], "requires_grad", False)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -0.1])
def test_a_rate_that_is_made_wrong_in_place_is_named_and_changes_nothing(wrong: float) -> None:
    model, rate = Network(), torch.tensor(0.1)
    optimizer = SINGD(model, lr=rate)
    step(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rate.fill_(wrong)
    with pytest.raises(ValueError, match=r"group 0: lr=.*: must be at least 0 and"):
        step(model, optimizer)
    assert all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())
    assert optimizer.param_groups[0]["steps"] == 1


@pytest.mark.parametrize("of", ["model", "names"])
def test_the_first_step_of_a_warm_up_from_zero_is_counted(of: str) -> None:
    """A step of rates of zero is one, unless its gradients are zeros too."""
    model = nn.Linear(3, 2)
    optimizer = SINGD(model if of == "model" else model.named_parameters())
    schedule = LambdaLR(optimizer, lambda i: min(1.0, i / 10.0))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["steps"] == 3
    assert optimizer.state[model.weight]["late.steps"].max() == 3
