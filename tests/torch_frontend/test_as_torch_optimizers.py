"""What torch's own tests ask of every one of its optimizers, asked of SINGD in every configuration.

`test/test_optim.py` and `torch.testing._internal.common_optimizers` of PyTorch have the promises.
What concerns flags that SINGD does not have (`foreach`, `fused`, `maximize`,
`differentiable`, `capturable`) and sparse gradients is left out.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression import Regression, closure_of, every, made, same, stepped, values
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from singd_torch import SINGD

# ---- where it goes -----------------------------------------------------------------------------

SCHEDULES: dict[str, list[Callable[[Any], Any]]] = {
    "none": [],
    "step": [lambda o: schedules.StepLR(o, gamma=0.9, step_size=10)],
    "plateau": [schedules.ReduceLROnPlateau],
    "linear": [lambda o: schedules.LinearLR(o, start_factor=0.4, total_iters=4)],
    "exponential": [lambda o: schedules.ExponentialLR(o, gamma=0.99)],
    "two": [
        lambda o: schedules.StepLR(o, gamma=0.99, step_size=10),
        lambda o: schedules.ExponentialLR(o, gamma=0.99),
        schedules.ReduceLROnPlateau,
    ],
    "sequence": [
        lambda o: schedules.SequentialLR(
            o,
            [schedules.ConstantLR(o, 0.5, 3), schedules.CosineAnnealingLR(o, 30)],
            milestones=[3],
        )
    ],
    "chain": [
        lambda o: schedules.ChainedScheduler(
            [schedules.MultiStepLR(o, [5, 9]), schedules.PolynomialLR(o, 40)]
        )
    ],
    "cosine with restarts": [lambda o: schedules.CosineAnnealingWarmRestarts(o, 10)],
    "one cycle": [lambda o: schedules.OneCycleLR(o, 0.05, total_steps=40)],
    "cyclic": [lambda o: schedules.CyclicLR(o, 0.01, 0.05, 5, cycle_momentum=False)],
    "a product": [lambda o: schedules.MultiplicativeLR(o, lambda _: 0.98)],
    "from zero": [lambda o: schedules.LambdaLR(o, lambda step: min(1.0, step / 10))],
    "averaged weights": [lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3)],
}


@every
def test_the_loss_falls(config: str, layer: bool) -> None:
    model, optimizer = made(config, layer)
    before = model.loss().item()
    for _ in range(40):
        optimizer.step(closure_of(model, optimizer))
    assert model.loss().item() < before
    assert repr(optimizer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("config", ["default", "tensor rate", "paper"])
def test_the_loss_falls_under_a_schedule(config: str, schedule: str) -> None:
    for layer in (True, False):
        model, optimizer = made(config, layer)
        running = [make(optimizer) for make in SCHEDULES[schedule]]
        before = model.loss().item()
        for _ in range(30):
            loss = optimizer.step(closure_of(model, optimizer))
            for one in running:
                if isinstance(one, schedules.ReduceLROnPlateau):
                    one.step(loss.detach())
                else:
                    one.step()
        assert model.loss().item() < before
        assert optimizer.skipped == 0


@pytest.mark.parametrize("layer", [True, False])
def test_parameters_that_are_not_contiguous_go_the_same_way(layer: bool) -> None:
    a, b = Regression(layer), Regression(layer, strided=True)
    assert not next(b.parameters()).is_contiguous()
    for model in (a, b):
        optimizer = SINGD(model)
        for _ in range(5):
            optimizer.step(closure_of(model, optimizer))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("layer", [True, False])
def test_groups_have_rates_and_decays_of_their_own(layer: bool) -> None:
    for own in ({"lr": 0.05, "fallback_lr": 0.02}, {"weight_decay": 0.3}, {"lr": 0.0}):
        model = Regression(layer)
        weight, bias = model.parameters()
        optimizer = SINGD(model, [{"params": [weight]}, {"params": [bias], **own}])
        before, start = values(model), model.loss().item()
        for _ in range(20):
            optimizer.step(closure_of(model, optimizer))
        assert model.loss().item() < start
        assert torch.equal(bias, before[1]) == (own.get("lr") == 0.0)


def test_a_rate_that_is_a_tensor_has_no_axes() -> None:
    for lr in (torch.tensor([0.1]), torch.ones(2)):
        with pytest.raises(ValueError, match=r"lr=tensor.*: must be a number or a 0-d"):
            SINGD(nn.Linear(3, 2), lr=lr)


def test_complex_parameters_step_as_their_two_parts() -> None:
    """On a function whose gradient depends on both."""
    both = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in (both.real, both.imag)]

    def rosenbrock(z: Tensor) -> Tensor:
        x, y = z
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    one, two = SINGD(nn.Module(), [both]), SINGD(nn.Module(), parts)
    for _ in range(10):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(both).backward()
        rosenbrock(torch.complex(*parts)).backward()
        torch.testing.assert_close(torch.view_as_real(both.grad)[..., 0], parts[0].grad)
        one.step()
        two.step()
        torch.testing.assert_close(both.real, parts[0])
        torch.testing.assert_close(both.imag, parts[1])


# ---- steps that do nothing ---------------------------------------------------------------------


@every
def test_a_step_without_gradients_does_nothing(config: str, layer: bool) -> None:
    model, optimizer = stepped(config, layer)
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.step()
    assert same(values(model), before)
    assert same(optimizer.state_dict()["state"], state)


@every
def test_a_step_along_zero_gradients_moves_by_momentum_and_decay_alone(
    config: str, layer: bool
) -> None:
    model, optimizer = made(config, layer)
    for group in optimizer.param_groups:
        group |= {"fallback_weight_decay": 0.0, "weight_decay": 0.0}
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # no warning either: a layer without inputs has such gradients and no rows
    assert same(values(model), before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_nothing(set_to_none: bool) -> None:
    model, optimizer = stepped("default", layer=True)
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all((g is None) if set_to_none else (g.count_nonzero() == 0) for g in gradients)


def test_parameters_may_be_empty_arrays() -> None:
    model = nn.Module()
    model.nothing, model.something = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(3))
    optimizer = SINGD(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert model.something.max() < 1.0


def test_parameters_may_have_dtypes_of_their_own() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=d)) for d in dtypes])
    optimizer = SINGD(model, fallback_lr=0.1, warmup=0)
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.dtype for p in model] == list(dtypes)
    assert all((p.abs() < 1.0).all() for p in model)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "non-leaf"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([{"params": ["weight"]}], TypeError, "can only optimize Tensors"),
        ("weight", TypeError, "params must be parameters"),
    ],
    ids=["empty", "not a leaf", "a name", "a name in a group", "a string"],
)
def test_what_cannot_be_trained_is_refused(
    params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SINGD(nn.Linear(3, 2), params)


def test_a_single_tensor_is_a_parameter() -> None:
    model = nn.Linear(3, 2)
    assert SINGD(model, model.weight).param_groups[0]["params"] == [model.weight]
