"""Hooks that a library copies to other modules: no call of these breaks, and no row is wrong.

`torch.ao.quantization` copies hooks so, by `register_forward_hook(hook)`, whatever way they were
registered in.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from uses import Does, draw, loss_of
from watched import Watched, check_products, layers

from singd_torch import SINGD


class Doubled(nn.Module):
    """A linear layer of a weight that is doubled first."""

    def __init__(self, weight: nn.Parameter, bias: Any) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Plain(nn.Module):
    """A module without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Own(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).add(1.0)


class Failing(nn.Module):
    """A module whose call is an error, when `fails`."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no")
        return x


def copy_hooks(old: nn.Module, new: nn.Module, which: str = "both") -> None:
    if which in ("before", "both"):
        for before in old._forward_pre_hooks.values():
            new.register_forward_pre_hook(before)
    if which in ("after", "both"):
        for after in old._forward_hooks.values():
            new.register_forward_hook(after)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()


def train(model: nn.Module, optimizer: SINGD, n: int = 3) -> list[str]:
    """Take steps, and return the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(n):
            optimizer.zero_grad()
            loss_of(model(draw(9, 5))).backward()
            optimizer.step()
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("before", [0, 2])
def test_a_layer_that_another_takes_the_place_of_is_trained_without_rows(before: int) -> None:
    model = network()
    optimizer = Watched(model)
    assert not train(model, optimizer, before)
    old: Any = model[2]
    model[2] = Doubled(old.weight, old.bias)
    copy_hooks(old, model[2])
    optimizer.products.clear()
    loss_of(model(draw(9, 5))).backward()
    assert ("2.weight", None) not in optimizer.products
    started = copy.deepcopy(model)
    assert any("'2.weight' is used in another way" in text for text in train(model, optimizer))
    assert {layer.name for layer in layers(optimizer) if layer.has_rows} == {"0.weight", "3.weight"}
    for p, q in zip(model.parameters(), started.parameters(), strict=True):
        assert not torch.equal(p, q)
    assert optimizer.skipped == 0


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "no parameters": Plain,
    "another layer of its class": lambda: nn.Linear(4, 4).double(),
    "a table": lambda: nn.Embedding(3, 4),
}


@pytest.mark.parametrize("to", OTHERS)
def test_hooks_of_a_layer_take_no_rows_of_others(to: str) -> None:
    model, other = network(), OTHERS[to]()
    optimizer = Watched(model)
    copy_hooks(model[2], other)
    x = torch.arange(3) if to == "a table" else draw(3, 4).requires_grad_()
    other(x).sum().backward()
    assert not optimizer.products
    loss_of(model(draw(9, 5))).backward()
    check_products(optimizer)


def test_hooks_of_attention_take_no_rows_of_another() -> None:
    model = nn.MultiheadAttention(6, 2, batch_first=True).double()
    other = nn.MultiheadAttention(6, 2, kdim=3, vdim=3, batch_first=True).double()
    twin = copy.deepcopy(model)
    optimizer = Watched(model)
    x, y = draw(2, 3, 6), draw(2, 4, 3)
    loss = model(x, x, x)[0].sin().sum()
    for one, args in ((other, (x, y, y)), (twin, (x, x, x))):
        copy_hooks(model, one)
        loss = loss + one(*args)[0].sin().sum()
    loss.backward()
    check_products(optimizer)
    optimizer.zero_grad()
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("which", ["before", "after", "both"])
@pytest.mark.parametrize("fails", [False, True])
def test_calls_are_seen_whichever_hooks_are_copied(which: str, fails: bool) -> None:
    """Of these each call before a module wants one after it."""

    def call(m: Any, x: Tensor) -> Tensor:
        h = m.own(m.other(torch.tanh(m.first(x))))
        return F.linear(h, m.last.weight, m.last.bias)

    own, other = Own(4, 4), Failing()
    model = Does(call, first=nn.Linear(5, 4), other=other, own=own, last=nn.Linear(4, 3)).double()
    optimizer = Watched(model)
    copy_hooks(own, other, which)
    if fails:
        other.fails = True
        with pytest.raises(RuntimeError, match="no"):
            model(draw(9, 5))
        other.fails = False
    loss_of(model(draw(9, 5))).backward()
    assert all(layer.pending for layer in layers(optimizer))
    check_products(optimizer)
    optimizer.zero_grad()
    assert not _get_current_function_mode_stack()
    assert not train(model, optimizer)
    assert optimizer.skipped == 0


@pytest.mark.filterwarnings("ignore:.*(quantization|reduce_range|quantized|observer)")
@pytest.mark.filterwarnings("ignore:the model was changed after")
@pytest.mark.parametrize("given", ["prepared", "before"])
def test_quantization_aware_training(given: str) -> None:
    try:
        Q: Any = importlib.import_module("torch.ao.quantization")
    except ImportError:
        pytest.skip("torch has no quantization any more")

    def go(model: Any, optimizer: SINGD, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.randn(9, 5)).sin().mean().backward()
            optimizer.step()

    model: Any = network().float()
    model.qconfig = Q.get_default_qat_qconfig("fbgemm")
    if given == "prepared":
        Q.prepare_qat(model.train(), inplace=True)
    optimizer = SINGD(model)
    if given == "before":
        go(model, optimizer, 2)
        Q.prepare_qat(model.train(), inplace=True)
    started = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"no rows of '0\.weight', .* since each is used by"):
        go(model, optimizer, 4)
    for p, q in zip(model.parameters(), started.parameters(), strict=True):
        assert not torch.equal(p, q)
    assert optimizer.skipped == 0
    Q.convert(model.eval(), inplace=True)
    plain = network().float()
    go(plain, SINGD(plain), 2)
    Q.quantize_dynamic(plain, {nn.Linear}, inplace=True)(torch.randn(9, 5))
