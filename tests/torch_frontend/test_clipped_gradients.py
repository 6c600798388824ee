"""Factors by rows go with gradients that are scaled as a whole, not with gradients cut by parts."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from watched import table

from singd_torch import SINGD

Clip = Callable[[nn.Module], object]


def each_by_itself(model: nn.Module) -> None:
    for p in model.parameters():
        nn.utils.clip_grad_norm_(p, 0.01)


def unit_by_unit(model: nn.Module) -> None:
    """As adaptive clipping: weights alone, and each row by a number of its own."""
    for p in model.parameters():
        if p.ndim > 1 and p.grad is not None:
            norms = p.grad.flatten(1).norm(dim=1)
            p.grad.mul_((0.3 * norms.mean() / norms).clamp(max=1.0).view(-1, *[1] * (p.ndim - 1)))


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def signs(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.sign_()


def all_at_once(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def a_few_entries(model: nn.Module) -> None:
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    nn.utils.clip_grad_value_(model.parameters(), 0.95 * largest)


def decayed(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(p.detach(), alpha=3.0)


def noisy(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(torch.randn_like(p), alpha=float(p.grad.std()))


def bias_rests(model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim == 1 and p.grad is not None:
            p.grad.zero_()


def columns_rest(model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim > 1 and p.grad is not None:
            p.grad[:, p.shape[1] // 2 :] = 0.0


def zeroed(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def scaled_tiny(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1e-25)


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5, bias=bias)
    )


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = (model(torch.randn(16, 2, 5, 5) + 1.0) - 1.0).square().mean()
    return loss


def rules(model: nn.Module, clip: Clip, passes: int = 1, *, keep: bool = False) -> set[str]:
    """What trains the weights after some steps."""
    optimizer = SINGD(model)
    for step in range(5):
        if not keep:
            optimizer.zero_grad()
        for _ in range(passes):
            loss_of(model).backward()
        if step or not keep:  # then there was a gradient before
            clip(model)
        optimizer.step()
    return {table(optimizer)[name] for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("clip", [each_by_itself, unit_by_unit, by_value, signs])
def test_where_gradients_are_cut_by_parts_the_factors_learn_from_them(clip: Clip) -> None:
    with pytest.warns(UserWarning, match="clipped by value or by parts"):
        found = rules(network(), clip)
    assert found == {"SINGD without rows"}


def test_the_warning_names_all_layers() -> None:
    named = r"no rows of '0\.weight' and '3\.weight' are taken, since each is clipped by value"
    with pytest.warns(UserWarning, match=named):
        rules(network(), by_value)


def test_a_weight_alone_may_be_scaled_as_a_whole() -> None:
    assert rules(network(bias=False), each_by_itself) == {"SINGD"}  # warnings are errors here
    with pytest.warns(UserWarning, match="clipped by value or by parts"):
        assert rules(network(bias=False), unit_by_unit) == {"SINGD without rows"}


@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("change", [noisy, decayed, bias_rests, columns_rest])
def test_small_layers_are_no_fault(inputs: int, change: Clip) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = SINGD(model)
    for _ in range(5):  # warnings are errors here
        optimizer.zero_grad()
        x = torch.randn(64, inputs)
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        change(model)
        optimizer.step()
    assert {table(optimizer)[name] for name in ("0.weight", "2.weight")} == {"SINGD"}


def test_labels_that_are_sampled_and_a_penalty_of_its_own_are_no_fault() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SINGD(model)
    for t in range(8):  # warnings are errors here
        optimizer.zero_grad()
        logits = model(torch.randn(16, 1))
        if t < 4:
            with optimizer.sampled_labels():
                drawn = torch.randint(3, (16,))
                nn.functional.cross_entropy(logits, drawn).backward(retain_graph=True)
        nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
        if t >= 4:
            (10.0 * model[0].weight.square().sum()).backward()
        optimizer.step()
    assert table(optimizer)["0.weight"] == "SINGD"


@pytest.mark.parametrize(
    "clip", [all_at_once, a_few_entries, decayed, noisy, zeroed, scaled_tiny, lambda model: None]
)
def test_other_changes_of_gradients_are_no_fault(clip: Clip) -> None:
    assert rules(network(), clip) == {"SINGD"}  # warnings are errors here


@pytest.mark.parametrize("given", [{"passes": 3}, {"keep": True}])
def test_nothing_is_known_of_a_sum_of_several_passes(given: dict[str, int]) -> None:
    assert rules(network(), by_value, **given) == {"SINGD"}  # type: ignore[arg-type]


def test_a_step_by_factors_of_rows_may_lead_uphill_of_a_gradient_that_is_cut() -> None:
    """Why rows are left: the loss grows by factors of them where each gradient is clipped."""

    def loss_after(clip: Clip, *, told: bool) -> float:
        torch.manual_seed(0)
        model = nn.Linear(20, 3)
        optimizer = SINGD(model, warmup=0)
        mean = 5.0 * torch.randn(20)
        target = nn.Linear(20, 3)
        for i in range(100):
            optimizer.param_groups[0]["lr"] = 0.12 * (1.0 - i / 100)
            x = mean + torch.randn(64, 20)
            loss = (model(x) - target(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            clip(model)
            if not told:  # as if nobody had looked
                optimizer._watcher._proofs.forget()
            optimizer.step()
        return float(loss.detach())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = loss_after(zeroed, told=True)
        unaware = loss_after(each_by_itself, told=False)
        aware = loss_after(each_by_itself, told=True)
    assert unaware > 100.0 * start > 100.0 * aware
