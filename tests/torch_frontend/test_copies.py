"""Copies of model and optimizer, and of the model alone."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import F32, Network, all_numbers, assert_equal, batches, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from watched import layers

from singd_core.structures import blockdiagonal, hierarchical
from singd_torch import SINGD

HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}
GIVEN: list[dict[str, Any]] = [
    {},
    {"recipe": "paper", "T": 2, "structures": ("hierarchical:2,3", "diagonal")},
    {"kfac": True, "momentum": 0.0},
]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("given", GIVEN, ids=["normalized", "paper", "kfac"])
@pytest.mark.parametrize("how", HOW)
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(
    how: str, given: dict[str, Any], before: int
) -> None:
    model, data = Network(), batches(F32, before + 3)
    optimizer = SINGD(model, **given)
    train(model, optimizer, data[:before])
    twin, own = HOW[how]((model, optimizer))
    kept = copy.deepcopy(all_numbers(model, optimizer))
    train(twin, own, data[before:])
    assert_equal(all_numbers(model, optimizer), kept)  # nothing is shared
    train(model, optimizer, data[before:])
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, own))
    assert repr(own) == repr(optimizer)
    assert (own.skipped, optimizer.skipped) == (0, 0)


def test_a_copy_has_the_count_of_skipped_steps() -> None:
    model, ((x, y),) = Network(), batches(F32, 1)
    optimizer = SINGD(model)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        train(model, optimizer, [(x * torch.nan, y)])
    _, own = copy.deepcopy((model, optimizer))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert own.skipped == 1


def test_a_copy_knows_how_processes_join_gradients() -> None:
    model = nn.Linear(2, 2)
    optimizer = SINGD(model, gradients="sum")
    _, other = copy.deepcopy((model, optimizer))
    assert other._stepper.summed


def test_a_copy_of_the_optimizer_alone_leaves_the_model_alone() -> None:
    """As with any torch optimizer, it holds copies of the parameters."""
    model, data = Network(), batches(F32, 4)
    optimizer = SINGD(model)
    train(model, optimizer, data[:2])
    kept = copy.deepcopy(all_numbers(model, optimizer))
    own = copy.deepcopy(optimizer)
    for p in own.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    own.step()
    assert_equal(all_numbers(model, optimizer), kept)


def test_an_average_of_the_model_gives_no_rows_and_takes_none() -> None:
    model, data = Network(), batches(F32, 4)
    plain = copy.deepcopy(model)
    optimizer, alone = SINGD(model), SINGD(plain)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for batch in data:
        train(model, optimizer, [batch])
        average.update_parameters(model)
        nn.functional.cross_entropy(average(batch[0]), batch[1]).backward()
        assert not any(layer.pending for layer in layers(optimizer))
    train(plain, alone, data)
    assert_equal(all_numbers(model, optimizer), all_numbers(plain, alone))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 2, 1), nn.Embedding(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.out[1](self.out[0](self.attend(x, x, x)[0])) + self.out[2](torch.arange(5)).mean()
        )


def hooks_of(model: nn.Module) -> list[Any]:
    names = [name for name in vars(nn.Module()) if "hook" in name]
    return [hook for m in model.modules() for name in names for hook in vars(m)[name] or ()]


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


MODELS = HOW | {"torch.save": through_torch_save, "copy": copy.copy}


@pytest.mark.parametrize("how", MODELS)
def test_a_copy_of_the_model_carries_no_hooks_and_the_model_keeps_its_own(how: str) -> None:
    model, x = Attending(), torch.randn(6, 3, 4)
    model.out[0].register_forward_hook(user_hook)
    before = len(hooks_of(model))
    optimizer = SINGD(model)
    model(x).sin().mean().backward()
    optimizer.step()
    watched = len(hooks_of(model))
    twin = MODELS[how](model)
    if how != "copy":  # which shares the modules
        assert len(hooks_of(twin)) == before
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    assert len(hooks_of(model)) == watched
    steps = optimizer.state[model.out[0].weight]["averages.k"].item()
    model(x).sin().mean().backward()
    optimizer.step()
    assert optimizer.state[model.out[0].weight]["averages.k"].item() == steps + 1


def user_hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """A hook that is not the optimizer's is copied like everything else."""


def test_a_pickled_model_does_not_ask_for_this_package() -> None:
    model = Attending()
    optimizer = SINGD(model)
    model(torch.randn(6, 3, 4)).sin().mean().backward()
    optimizer.step()
    assert b"singd" not in pickle.dumps(model)


class Learner(nn.Module):
    """A model that holds its optimizer, as learners of reinforcement learning do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Attending()
        self.optimizer = SINGD(self)

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.body(x).sin().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_model_that_holds_its_optimizer_is_copied_with_it(how: str, before: int) -> None:
    learner = Learner()
    data = [torch.randn(6, 3, 4) for _ in range(before + 2)]
    for x in data[:before]:
        learner.step(x)
    twin = MODELS[how](learner)
    assert len(hooks_of(twin)) == len(hooks_of(learner))
    assert repr(twin.optimizer) == repr(learner.optimizer)
    for x in data[before:]:
        learner.step(x)
        twin.step(x)
    assert_equal(all_numbers(learner, learner.optimizer), all_numbers(twin, twin.optimizer))
    assert "__setstate__" not in vars(twin)


def test_structures_that_a_function_makes_are_pickled() -> None:
    model, data = Network(), batches(F32, 3)
    optimizer = SINGD(model, structures=(blockdiagonal(4), hierarchical(2, 3)))
    train(model, optimizer, data[:2])
    twin, own = pickle.loads(pickle.dumps((model, optimizer)))
    assert own.param_groups[0]["structures"] == (blockdiagonal(4), hierarchical(2, 3))
    train(model, optimizer, data[2:])
    train(twin, own, data[2:])
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, own))


def test_a_copy_can_be_scripted_while_the_optimizer_lives() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 4)
    optimizer = SINGD(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        scripted = torch.jit.script(copy.deepcopy(model))
        with pytest.raises(AttributeError, match=r"torch\.jit\.script\(copy\.deepcopy\(model\)\)"):
            torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    assert optimizer.skipped == 0


class Traced(nn.Module):
    """With a weight that a function uses, so that calls of the model are watched."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 3)
        self.own = nn.Linear(5, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.linear(self.up(x), self.own.weight))
        return y


class Handed(Traced):
    """With a copy of its own, that hands all attributes on, hooks too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            vars(new)[name] = copy.deepcopy(value, memo)
        return new


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", [lambda: torch.fx.symbolic_trace(Traced()), Handed])
def test_a_model_that_hands_its_hooks_on_is_copied_alone(
    make: Callable[[], nn.Module], how: str
) -> None:
    model, x = make(), torch.randn(4, 6)
    optimizer = SINGD(model, T=1)
    twin = HOW[how](model)
    for one in (model, twin):
        one(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), twin.parameters()))
