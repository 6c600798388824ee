"""What is given in place of a model or of parameters is named at once."""

from typing import Any

import pytest
import torch
from small_network import network
from torch import nn
from watched import table

from singd_torch import SINGD, estimate


@pytest.mark.parametrize("value", [1e-3, "sgd", 3, None])
def test_what_is_given_in_place_of_parameters_is_named(value: Any) -> None:
    """A rate above all, which comes second in every other optimizer."""
    model = network()
    with pytest.raises(TypeError, match="params must be parameters or groups of them, not"):
        SINGD(model, value) if value is not None else SINGD(model, [{"params": None}])
    for given in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"SINGD\(model, lr=0\.001\)"):
            SINGD(given, 1e-3)


def test_a_set_of_parameters_is_refused() -> None:
    model = network()
    for params in (set(model.parameters()), [{"params": set(model.parameters())}]):
        with pytest.raises(TypeError, match="in a set, whose order changes between runs"):
            SINGD(model, params)


def test_a_budget_of_nothing_that_asks_for_one_is_named() -> None:
    model = network()
    for function in (SINGD, estimate):
        with pytest.raises(ValueError, match='memory_budget=10 is for structures="auto" alone'):
            function(model, memory_budget=10)


def test_a_parameter_given_twice_is_an_error() -> None:
    model = network()
    p = model[0].weight
    with pytest.raises(ValueError, match="twice"):
        SINGD(model, [p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        SINGD(model, [{"params": [p]}, {"params": [p]}])
    optimizer = SINGD(model, [p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


def test_a_parameter_that_is_not_of_the_model_is_trained_by_adamw() -> None:
    """Such as a temperature that belongs to the loss."""
    model, temperature = network(), nn.Parameter(torch.ones(1))
    optimizer = SINGD(model, [*model.parameters(), temperature])
    (model(torch.randn(4, 6)) * temperature).square().mean().backward()
    optimizer.step()
    assert temperature.item() != 1.0
    assert "(not of the model)" in repr(optimizer)


def test_parameters_that_are_not_of_the_model_have_names_of_their_own() -> None:
    """Such as another model's, whose matrices learn from gradients."""
    model, other = network(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SINGD(model, [*model.parameters(), *other.parameters()])
    for _ in range(2):
        optimizer.zero_grad()
        other(model(torch.randn(4, 6))).square().mean().backward()
        optimizer.step()
    first = len(list(model.parameters()))
    names = [f"params[{first + i}] (not of the model)" for i in range(4)]
    assert {names[0], names[2]} <= {name.rpartition("/")[0] for name in optimizer.diagnostics()}
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})  # they keep their names
    assert {f"params[{first + i}] (not of the model)" for i in range(5)} <= table(optimizer).keys()


def test_several_models_and_dictionaries_are_told_what_to_give() -> None:
    model: Any = network()
    for given in ([model, model], [{"params": [model]}], nn.ModuleList([model])):
        with pytest.raises(TypeError, match=r"SINGD\(nn\.ModuleList\(\[first, second\]\)\)"):
            SINGD(model, given)
    with pytest.raises(TypeError, match="not modules"):
        SINGD([model, model])
    for given in (model.state_dict(), {"params": model.parameters()}):
        with pytest.raises(TypeError, match="not a dictionary: give a list of groups"):
            SINGD(model, given)


@pytest.mark.parametrize("model", [nn.Tanh(), nn.Linear(3, 2).requires_grad_(False)])
def test_a_model_with_nothing_to_train_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        SINGD(model)


def test_no_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        SINGD(network(), [])


@pytest.mark.parametrize("model", [None, "model", 3])
def test_something_that_is_no_model_is_an_error(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, or the parameters"):
        SINGD(model)


def test_modules_in_place_of_parameters_are_an_error() -> None:
    with pytest.raises(TypeError, match="not modules"):
        SINGD([nn.Linear(1, 1)])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_parameter_without_a_shape_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: call the model once"):
        SINGD(model)
    model(torch.zeros(1, 4))
    names = [name for name, _ in model.named_parameters()]
    assert table(SINGD(model)) == dict.fromkeys(names, "SINGD")


def test_data_parallel_is_an_error() -> None:
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        SINGD(nn.DataParallel(network()))
