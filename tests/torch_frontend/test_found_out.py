"""What a layer does where no call is seen is found out, and belongs to its parameter."""

import copy
import json

import pytest
import torch
from test_turns import MISSES, _lost, _step_of, _with_a_lost_layer
from torch import nn
from watched import Product

from singd_torch import SINGD

pytestmark = pytest.mark.filterwarnings(MISSES)


def three_layers() -> tuple[nn.Sequential, SINGD]:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    return model, SINGD(model)


def test_it_goes_to_parameters_that_took_the_places_of_others() -> None:
    model, optimizer = _with_a_lost_layer()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    _step_of(model, optimizer)
    saved = optimizer.state_dict()["param_groups"][0]["layer_notes"]
    assert [name for _, name, _ in json.loads(saved)] == ["1.weight"]
    assert _lost(optimizer) == ["1.weight"]


@pytest.mark.parametrize("how", ["optimizer.zero_grad", "model.zero_grad"])
def test_a_pass_that_is_dropped_proves_nothing(how: str) -> None:
    model, optimizer = three_layers()
    for _ in range(3):
        optimizer.zero_grad()
        unseen = 3.0 * Product.apply(torch.randn(16, 4), model[1].weight)
        (model(torch.randn(16, 5)).square().mean() + unseen.square().mean()).backward()
        (optimizer if how == "optimizer.zero_grad" else model).zero_grad()
        model(torch.randn(16, 5)).square().mean().backward()
        optimizer.step()
    assert _lost(optimizer) == []


def test_a_step_of_joined_gradients_proves_nothing_and_later_ones_do() -> None:
    model, optimizer = three_layers()
    _step_of(model, optimizer)
    joined = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(16, 5)).square().mean().backward()
        for p, own in zip(model.parameters(), joined, strict=True):
            own += p.grad
    for p, own in zip(model.parameters(), joined, strict=True):
        p.grad = own
    optimizer.step()
    assert _lost(optimizer) == []
    for _ in range(6):
        _step_of(model, optimizer, unseen=True)
    assert _lost(optimizer) == ["1.weight"]
