"""Rows of several backward passes before a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD


def batches() -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return torch.randn(2, 16, 4, dtype=torch.float64).unbind()


def averages(passes: Callable[[nn.Module, Tensor, Tensor], None], **given: Any) -> dict[str, float]:
    """The mean diagonals of the curvature of a layer after a step with these passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = SINGD(model, **given)
    passes(model, *batches())
    optimizer.step()
    state = optimizer.state[model[0].weight]
    return {key: state[f"averages.{key}"].item() for key in ("t_U", "t_G")}


@pytest.mark.parametrize("loss_average", ["batch", None])
def test_terms_of_one_loss_may_have_backward_passes_of_their_own(loss_average: Any) -> None:
    """Terms that have nothing in common give the rows of their sum."""

    def signs(z: Tensor) -> Tensor:  # with which the products of both terms' gradients cancel
        return torch.tensor([1.0, -1.0], dtype=z.dtype).repeat(8)[:, None]

    def terms(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        z = model(torch.cat([x[:8], x[:8]]).reshape(2, 8, 4).transpose(0, 1).reshape(16, 4))
        return z.sum(1).mean(), (signs(z) * z).sum(1).mean()

    def one(model: nn.Module, x: Tensor, y: Tensor) -> None:
        sum(terms(model, x)).backward()  # type: ignore[union-attr]

    def two(model: nn.Module, x: Tensor, y: Tensor) -> None:
        first, second = terms(model, x)
        first.backward(retain_graph=True)
        second.backward()

    found, expected = (averages(passes, loss_average=loss_average) for passes in (two, one))
    assert found == pytest.approx(expected, rel=1e-12)


def test_passes_of_calls_of_their_own_are_micro_batches() -> None:
    def one(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model(torch.cat([x, y])).square().sum(1).mean().backward()

    def two(model: nn.Module, x: Tensor, y: Tensor) -> None:
        for batch in (x, y):
            (model(batch).square().sum(1).mean() / 2).backward()

    assert averages(two) == pytest.approx(averages(one), rel=1e-12)


def test_a_gradient_of_zeros_is_no_sign_that_it_was_dropped() -> None:
    """Its inputs are among the inputs of all passes."""

    def one(model: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = torch.tensor([0.0, 1.0], dtype=x.dtype).repeat_interleave(len(x))
        (weight * model(torch.cat([x, y])).square().sum(1)).mean().backward()

    def two(model: nn.Module, x: Tensor, y: Tensor) -> None:
        for weight, batch in ((0.0, x), (1.0, y)):
            (weight * model(batch).square().sum(1).mean() / 2).backward()

    assert averages(two) == pytest.approx(averages(one), rel=1e-12)


def test_gradients_of_both_ways_are_of_one_batch() -> None:
    """What `torch.autograd.grad` has returned counts where it was written to the gradients."""

    def one(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model(torch.cat([x, y])).square().sum(1).mean().backward()

    def two(model: nn.Module, x: Tensor, y: Tensor) -> None:
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(x).square().sum(1).mean() / 2, parameters)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        (model(y).square().sum(1).mean() / 2).backward()

    assert averages(two) == pytest.approx(averages(one), rel=1e-12)


def test_a_pass_that_is_no_term_of_the_loss_does_not_count() -> None:
    def one(model: nn.Module, x: Tensor, y: Tensor) -> None:
        (model(x) - model(y)).square().sum(1).mean().backward()

    def two(model: nn.Module, x: Tensor, y: Tensor) -> None:
        x.requires_grad_(True)
        z = model(x)
        torch.autograd.grad(z.sum(), x, retain_graph=True)
        (z - model(y)).square().sum(1).mean().backward()

    assert averages(two) == pytest.approx(averages(one), rel=1e-12)


@pytest.mark.parametrize("sides", [(6, 5), (600, 512)])
def test_many_gradients_in_one_pass_bring_no_rows(sides: tuple[int, int]) -> None:
    """As of each sample, for a log or for statistics: each is of a loss of its own."""

    def trained(*, logged: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(*sides), nn.Tanh(), nn.Linear(sides[1], 3))
        optimizer = SINGD(model, T=1)
        for x in torch.randn(3, 8, sides[0]).unbind():
            optimizer.zero_grad()
            losses = model(x).square().sum(1)
            if logged:
                each, of = torch.eye(len(losses)), list(model.parameters())
                given = {"is_grads_batched": True, "retain_graph": True}
                torch.autograd.grad(losses, of, each, **given)  # type: ignore[arg-type]
            losses.mean().backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    assert torch.equal(trained(logged=True), trained(logged=False))


def test_the_mean_of_many_gradients_of_one_pass_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, before = SINGD(model), [p.detach().clone() for p in model.parameters()]
    losses, of = model(torch.randn(8, 6)).square().sum(1), list(model.parameters())
    each = torch.autograd.grad(losses, of, torch.eye(8), is_grads_batched=True)
    for p, g in zip(of, each, strict=True):
        p.grad = g.mean(0)
    with pytest.warns(UserWarning, match="no rows of '0.weight' and '2.weight' have been seen"):
        optimizer.step()
    assert not any(map(torch.equal, of, before))
