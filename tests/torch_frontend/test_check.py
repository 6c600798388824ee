"""`check` finds layers whose rows do not tell their gradient, and changes nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import layers

from singd_core import Linear
from singd_torch import SINGD, check, register_layer


class Doubled(nn.Module):
    """A layer that is registered for what it is not: its output is twice a linear map's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x @ self.weight.T)


register_layer(Doubled, Linear())


class Turned(nn.Module):
    """A layer that is registered for what it is not: its weight is stored the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


register_layer(Turned, Linear())


def loss(model: nn.Module) -> Tensor:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    return model(x).sin().square().mean()


def test_right_rows_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = SINGD(model)
    loss(model).backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    pending = [dict(layer.pending) for layer in layers(optimizer)]
    assert all(pending)
    gaps = check(model, loss)
    assert sorted(gaps) == ["0.weight", "3.weight"]
    assert max(gaps.values()) < 1e-5  # float32, sums of 9 products
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert [dict(layer.pending) for layer in layers(optimizer)] == pending


def test_wrong_rows_are_named() -> None:
    model = nn.Sequential(Doubled(), nn.Linear(4, 3))
    with pytest.raises(AssertionError, match=r"of these layers .*: 0\.weight \(0\.5, where up to"):
        check(model, loss)
    assert check(model, loss, tolerance=0.6)["0.weight"] == pytest.approx(0.5)


def test_rows_with_other_sides_are_named() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is no product .* have 5 inputs and 4 out"):
        check(nn.Sequential(Turned(), nn.Tanh(), nn.Linear(4, 3)), loss)


def test_layers_without_rows_or_gradients_are_left_out() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.tril(), self.bias)

    model = nn.ModuleDict(
        {"used": Masked(5, 4), "head": nn.Linear(4, 3), "unused": nn.Linear(4, 3)}
    )
    gaps = check(model, lambda m: m["head"](m["used"](torch.randn(9, 5))).square().mean())
    assert list(gaps) == ["head.weight"]


def test_layers_whose_derivatives_are_in_the_loss_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2))

    def slope(model: nn.Module) -> Tensor:
        x = torch.randn(9, 5, requires_grad=True)
        (found,) = torch.autograd.grad(model[:3](x).sum(), x, create_graph=True)
        return found.square().mean() + model(x).square().mean()

    assert check(model, slope).keys() == {"3.weight"}


class Adjoint(torch.autograd.Function):
    """Steps along a field, whose gradients it takes itself, as adjoints of ODE solvers do."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, y: Tensor, *_: Tensor) -> Tensor:
        ctx.field = field
        ctx.save_for_backward(y)
        return y + field(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        with torch.enable_grad():
            y = ctx.saved_tensors[0].detach().requires_grad_()
            dy, *own = torch.autograd.grad(ctx.field(y), (y, *ctx.field.parameters()), g)
        return None, g + dy, *own


def test_layers_whose_gradients_a_function_takes_itself_are_left_out() -> None:
    model = nn.ModuleDict(
        {
            "field": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
            "head": nn.Linear(4, 3),
        }
    )

    def loss(model: Any) -> Tensor:
        y = torch.randn(9, 4)
        for _ in range(3):
            y = Adjoint.apply(model["field"], y, *model["field"].parameters())
        return model["head"](y).square().mean()

    assert check(model, loss).keys() == {"head.weight"}
    optimizer = SINGD(model)
    loss(model).backward()
    with pytest.warns(UserWarning, match=r"0.weight' and 'field.2.weight' .* autograd\.Function"):
        optimizer.step()


def test_a_penalty_is_told_from_a_bug_by_the_error() -> None:
    model = nn.Linear(5, 4)
    with pytest.raises(AssertionError, match="as a penalty does"):
        check(model, lambda m: loss(m) + m.weight.square().sum())


def test_gradients_that_are_no_numbers_are_no_bug() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    message = r"the loss is nan, and gradients of '0\.weight' and '1\.weight' are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        check(model, lambda m: loss(m) + m(torch.full((1, 5), torch.nan)).sum())


def test_a_loss_of_another_model_is_no_check() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    for other in (lambda _: loss(model), lambda m: loss(m).detach()):
        with pytest.raises(ValueError, match="with the argument of the function"):
            check(model, other)


@pytest.mark.parametrize("within", ["attribute", "list"])
def test_a_model_that_keeps_a_graph_is_no_model_to_copy(within: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

    def loss(model: nn.Module) -> Tensor:
        y = model(torch.randn(5, 3))
        model[1].kept = y if within == "attribute" else [y]
        return y.square().mean()

    assert check(model, loss)
    loss(model)
    such = ", such as '1.kept'" if within == "attribute" else ""
    with pytest.raises(RuntimeError, match=f"a tensor with a graph{such}: call check before the"):
        check(model, loss)
    del model[1].kept
    assert check(model, loss)


def test_what_is_no_loss_is_named() -> None:
    model: Any = nn.Linear(5, 4)
    x = torch.randn(3, 5)
    for given, what in (
        (lambda m: None, r"one number in a tensor, not NoneType, as in check\("),
        (lambda m: loss(m).item(), "not float"),
        (lambda m: m(x), r"not \(3, 4\)"),
        (loss(model), "loss must be a function of the model"),
    ):
        with pytest.raises(TypeError, match=what):
            check(model, given)
    with pytest.raises(TypeError, match=r"wants the model, a torch\.nn\.Module, not generator"):
        check(model.parameters(), loss)
    with torch.no_grad():  # as a script is that evaluates
        assert list(check(model, lambda m: loss(m)[None])) == ["weight"]
