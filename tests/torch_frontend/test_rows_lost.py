"""Layers whose rows came before, and come no longer, learn from their gradients."""

import copy
from typing import Any

import pytest
import torch
from small_network import assert_same, everything, loss_of, network, step
from test_rows_never_seen import rules, train
from torch import Tensor, nn
from watched import Product

from singd_torch import SINGD


class Switched(nn.Module):
    """A layer whose weight goes to a function from some step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3, bias=False)
        self.by_function = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.by_function:
            return Product.apply(h, self.last.weight)  # type: ignore[no-any-return]
        return self.last(h)  # type: ignore[no-any-return]


def switched(**given: Any) -> tuple[Switched, SINGD, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Switched().double()
    return model, SINGD(model, **given), (torch.randn(16, 5).double(), torch.randn(16, 3).double())


def test_gradients_take_over_when_rows_come_no_longer() -> None:
    model, optimizer, data = switched(T=2, growing_T=False)
    train(model, optimizer, data, 5, seen=True)
    K = optimizer.state[model.last.weight]["K.matrix"].clone()
    model.by_function = True
    train(model, optimizer, data, 5, seen=True)  # of two refreshes
    assert torch.equal(optimizer.state[model.last.weight]["K.matrix"], K)
    with pytest.warns(UserWarning, match=r"no rows of 'last\.weight' have come for 3 refreshes"):
        losses = train(model, optimizer, data, 20, seen=True)
    assert losses[-1] < losses[0]
    assert optimizer.state[model.last.weight]["averages.k"] == 10.0  # began anew
    lines = {line.split()[0]: line for line in repr(optimizer).splitlines()[2:]}
    assert "without rows" in lines["last.weight"]
    assert "without rows" not in lines["first.weight"]
    model.by_function = False
    train(model, optimizer, data, 4, seen=True)
    assert rules(optimizer) == {"SINGD"}
    assert optimizer.skipped == 0


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_what_has_no_gradient_or_refused_rows_is_not_missed(recipe: str) -> None:
    model, optimizer, data = switched(recipe=recipe, T=1)
    train(model, optimizer, data, 3, seen=True)
    train(model, optimizer, data, 6, seen=False)  # by choice
    K = optimizer.state[model.last.weight]["K.matrix"].clone()
    for _ in range(6):
        optimizer.zero_grad(set_to_none=False)
        model.first(data[0]).square().mean().backward()
        optimizer.step()
    assert rules(optimizer) == {"SINGD"}
    assert torch.equal(optimizer.state[model.last.weight]["K.matrix"], K)


def test_adamw_does_not_take_over() -> None:
    model, optimizer, data = switched(recipe="paper", T=1)
    train(model, optimizer, data, 3, seen=True)
    model.by_function = True
    with pytest.warns(UserWarning, match=r"no rows of 'last\.weight' .* the factors stay"):
        train(model, optimizer, data, 4, seen=True)
    assert rules(optimizer) == {"SINGD"}


@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_that_are_joined_by_hand_after_zero_grad(steps: int) -> None:
    """As where the gradients of several tasks are projected onto each other."""
    model, optimizer, data = switched(T=1)
    train(model, optimizer, data, steps, seen=True)

    def joined(n: int) -> None:
        for _ in range(n):
            gradients = []
            for task in range(2):
                optimizer.zero_grad()
                model(data[0])[:, task].square().mean().backward()
                gradients.append([p.grad for p in model.parameters()])
            optimizer.zero_grad()
            for p, *own in zip(model.parameters(), *gradients, strict=True):
                p.grad = sum(own)
            optimizer.step()

    with pytest.warns(UserWarning, match="zero_grad"):
        joined(4)
    assert rules(optimizer) == {"SINGD without rows"}
    K = optimizer.state[model.last.weight]["K.matrix"].clone()
    joined(1)
    assert not torch.equal(optimizer.state[model.last.weight]["K.matrix"], K)


def test_a_gradient_that_is_replaced_after_backward_keeps_its_rows() -> None:
    """No gradients were joined: a step has used those before."""
    model, optimizer, (x, y) = switched(T=1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for p in model.parameters():
            p.grad = p.grad * 0.5
        optimizer.step()
    layers = model.first, model.last
    assert [optimizer.state[m.weight]["averages.k"].item() for m in layers] == [4.0, 4.0]


def test_levels_count_in_a_refresh_whose_rows_are_refused() -> None:
    """A copy knows nothing that was made before."""
    model = network()
    optimizer = SINGD(model, T=3, growing_T=False, warmup=0)
    for _ in range(6):  # the last one has measured levels for the next one
        step(model, optimizer)
    both, x = [(model, optimizer), copy.deepcopy((model, optimizer))], torch.randn(9, 6)
    for one, own in both:
        own.zero_grad()
        with own.no_rows():
            loss_of(one, x).backward()
        own.step()
    assert_same(*(everything(one, own) for one, own in both))
