"""A weight that is also used where no call is seen: its layer is trained without rows."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unseen import Loss, Net, hidden, loss_of, train
from watched import Product, table

from singd_torch import SINGD


@contextmanager
def warned(name: str) -> Iterator[None]:
    """One warning, of one layer."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`torch.jit")  # torch's, in forward derivatives
        yield
    [text] = {str(warning.message) for warning in found}
    assert f"no rows of {name!r} are taken, since it is used where no call is seen" in text


# ---- what is noticed ----------------------------------------------------------------------------


def by_function_of_ones_own(model: Net, x: Tensor) -> Tensor:
    return loss_of(model, x) + Product.apply(hidden(x), model.table.weight).cos().mean()


def by_function_of_ones_own_beside_a_tied_head(model: Net, x: Tensor) -> Tensor:
    used = Product.apply(hidden(x), model.table.weight)
    return loss_of(model, x, tied=True) + used.square().mean()


def in_the_loss(model: Net, x: Tensor) -> Tensor:
    logits = F.linear(hidden(x), model.head.weight, model.head.bias)
    return loss_of(model, x) + F.cross_entropy(logits.flatten(0, 1), x.flatten())


def mapped(model: Net, x: Tensor) -> Tensor:
    each = torch.func.vmap(lambda h: torch.tanh(model.head.weight @ h))
    return loss_of(model, x) + each(hidden(x)[0]).square().mean()


def by_forward_derivative(model: Net, x: Tensor) -> Tensor:
    h = hidden(x)
    _, tangent = torch.func.jvp(lambda h: torch.tanh(model.head(h)), (h,), (torch.ones_like(h),))
    return loss_of(model, x) + 10 * tangent.square().mean()


def convolution(model: Net, x: Tensor) -> Tensor:
    used = F.conv1d(hidden(x).mT, model.conv.weight, groups=2)
    return loss_of(model, x) + used.sin().mean()


def attention(model: Net, x: Tensor) -> Tensor:
    used = Product.apply(hidden(x), model.attention.in_proj_weight)
    return loss_of(model, x) + used.sin().mean()


def experts(model: Net, x: Tensor) -> Tensor:
    return loss_of(model, x) + 10 * torch.bmm(hidden(x)[:3], model.experts).sin().mean()


UNSEEN: dict[str, tuple[Loss, ...]] = {
    "table.weight": (by_function_of_ones_own, by_function_of_ones_own_beside_a_tied_head),
    "head.weight": (in_the_loss, mapped, by_forward_derivative),
    "conv.weight": (convolution,),
    "attention.in_proj_weight": (attention,),
    "experts": (experts,),
}
CASES = [pytest.param(name, loss, id=loss.__name__) for name in UNSEEN for loss in UNSEEN[name]]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_a_use_that_is_not_seen_is_noticed_in_the_first_step(name: str, loss: Loss) -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    with warned(name):
        train(model, optimizer, loss, 1)
    train(model, optimizer, loss)  # it has been said, and warnings are errors here
    rules = table(optimizer)
    others = ("table.weight", "conv.weight", "attention.in_proj_weight", "experts", "head.weight")
    assert {rules.pop(name), *map(rules.get, set(others) - {name})} == {
        "SINGD without rows",
        "SINGD",
    }


def test_a_use_that_begins_later_is_noticed_by_twice_the_steps() -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    train(model, optimizer, loss_of, 12)
    with warned("head.weight"):
        train(model, optimizer, in_the_loss, 12)
    assert table(optimizer)["head.weight"] == "SINGD without rows"


def test_what_was_learned_from_half_of_the_rows_begins_anew() -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    train(model, optimizer, loss_of, 4)
    old = optimizer.state[model.head.weight]["K.matrix"]
    optimizer.param_groups[0]["steps"] = 8  # the next that is looked at
    with warned("head.weight"):
        train(model, optimizer, in_the_loss, 1)
    assert optimizer.state[model.head.weight]["K.matrix"] is not old
    assert optimizer.skipped == 0
