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


class Twins(nn.Module):
    """Two equal layers; rows are taken of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def train_on(self, optimizer: SINGD, numbers: range) -> None:
        for i in numbers:
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            self.a(x).tanh().sub(x).square().mean().backward()
            with optimizer.no_rows():
                self.b(x).tanh().sub(x).square().mean().backward()
            optimizer.step()


def through_a_checkpoint(both: Any) -> Any:
    model, optimizer = both
    twin = copy.deepcopy(model)
    own = SINGD(twin)
    own.load_state_dict(optimizer.state_dict())
    return twin, own


@pytest.mark.filterwarnings("ignore:no rows of .* have been seen")
@pytest.mark.parametrize("how", [*HOW.values(), through_a_checkpoint], ids=[*HOW, "checkpoint"])
@pytest.mark.parametrize("is_last", [False, True])
def test_equal_layers_that_learn_from_rows_and_from_gradients_go_on_apart(
    how: Callable[[Any], Any], is_last: bool
) -> None:
    model = Twins()
    if is_last:  # whichever is the first of the model
        model.a, model.b = model.b, model.a
        model.register_module("a", model._modules.pop("a"))
    optimizer = SINGD(model)
    model.train_on(optimizer, range(6))
    twin, own = how((model, optimizer))
    for one, its in ((model, optimizer), (twin, own)):
        one.train_on(its, range(6, 10))
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, own))


@pytest.mark.parametrize("how", HOW)
def test_a_layer_that_was_out_of_its_group_for_a_while_is_copied_as_it_is(how: str) -> None:
    """Its gradient refreshes factors that rows had made, until there are rows."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    data = batches(F32, 9)
    optimizer = SINGD(model, T=1)
    group = optimizer.param_groups[0]
    for i, batch in enumerate(data):
        if i in (3, 5):
            group["params"] = [*model.parameters()][: 2 if i == 3 else 4]
        if i == 6:
            twin, own = HOW[how]((model, optimizer))
            train(twin, own, data[i:])
        train(model, optimizer, [batch])
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, own))


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
