"""Parameters that a model has after the optimizer was built, or that have another shape by then."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_model_changes import adapted, network, train
from torch import nn
from torch.nn.utils import parametrizations

from singd_torch import SINGD

# ---- parameters that nobody trains ---------------------------------------------------------------


def other_parameter(model: Any) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def other_module(model: Any) -> None:
    model[1] = nn.Linear(6, 6).double()


def more_modules(model: Any) -> None:
    model[1] = nn.Sequential(model[1], nn.Linear(6, 6).double())


def unfrozen(model: Any) -> None:
    model[3].weight.requires_grad_(True)


NEW = {
    other_parameter: "1.weight",
    other_module: "1.weight",
    more_modules: "1.1.weight",
    adapted: "1.parametrizations.weight.0.down",
    lambda model: parametrizations.weight_norm(model[1]): "1.parametrizations.weight.original0",
    unfrozen: "3.weight",
}


@pytest.mark.parametrize("change", NEW)
def test_parameters_of_no_group_are_warned_about_and_trained_when_they_are_given(
    change: Callable[[Any], Any],
) -> None:
    torch.manual_seed(0)
    model = network()
    model[3].weight.requires_grad_(False)
    optimizer = SINGD(model)
    train(model, optimizer)
    change(model)
    first = f"the model's parameter {NEW[change]!r} has a gradient and is in no parameter group"
    assert any(first in warning for warning in train(model, optimizer))
    assert not train(model, optimizer)  # it was said
    known = {p for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in model.parameters() if p.requires_grad and p not in known]
    old = [p.detach().clone() for p in new]
    optimizer.add_param_group({"params": new})
    assert not train(model, optimizer, 2)
    assert all(not torch.equal(p, q) for p, q in zip(new, old, strict=True))


def test_parameters_that_were_left_out_by_choice_are_not() -> None:
    model = network()
    optimizer = SINGD(model, model[0].parameters())
    model.add_module("4", nn.Identity())  # so that the model is looked at again
    assert not train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    assert not train(twin, copied, 3)


@pytest.mark.parametrize("replace", ["to_empty", "assign"])
def test_a_model_with_other_parameters_alone_is_an_error_that_names_the_causes(
    replace: str,
) -> None:
    with torch.device("meta"):
        model = network()
    optimizer, other = SINGD(model), network()
    if replace == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(other.state_dict(), assign=replace == "assign")
    with pytest.raises(RuntimeError, match=r"model\.to_empty\(\.\.\.\) and load_state_dict"):
        train(model, optimizer)


def test_a_gradient_moves_a_frozen_parameter_as_with_any_torch_optimizer() -> None:
    """A loop may keep its own gradients; without one a frozen parameter stays."""
    model = network()
    optimizer = SINGD(model)
    train(model, optimizer, 2)
    model.requires_grad_(False)
    old = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(not torch.equal(p, old[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    old = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


def test_steps_without_any_gradient_are_warned_about_once() -> None:
    model = network()
    trained, optimizer = copy.deepcopy(model), SINGD(model)
    assert not train(trained, optimizer, 9)
    [warning] = train(trained, optimizer, 20)
    assert "no parameter of this optimizer has had a gradient for 10 steps" in warning
    model.requires_grad_(False)
    assert not train(trained, SINGD(model, model.parameters()), 20)  # by choice


# ---- other shapes --------------------------------------------------------------------------------


def longer_table(model: Any) -> None:
    model[0].weight.data = torch.randn(12, 6, dtype=torch.float64)
    model[0].num_embeddings = 12


def longer_head(model: Any) -> None:
    model[3].weight.data = torch.randn(12, 6, dtype=torch.float64)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("resize", [longer_table, longer_head])
def test_another_shape_is_an_error_before_anything_changes(
    resize: Callable[[Any], None], before: int
) -> None:
    model = network()
    optimizer = SINGD(model)
    train(model, optimizer, before)
    resize(model)
    old, steps = copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["steps"]
    with pytest.raises(RuntimeError, match=r"has shape \(12, 6\), and had \(10, 6\) when"):
        train(model, optimizer)
    for p in model.parameters():  # as of a loop that goes on
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="build the optimizer after what resizes the model"):
        optimizer.step()
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())
    assert optimizer.param_groups[0]["steps"] == steps


def test_vectors_of_another_shape_are_an_error_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = SINGD(model)
    model[1].weight.data, model[1].bias.data = torch.ones(3), torch.ones(3)
    model[1].normalized_shape = (3,)
    model[1](torch.randn(5, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'1\.weight' has shape \(3,\), and had \(4,\)"):
        optimizer.step()
