"""Calls whose rows nobody can tell give none: their weights are trained without."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from uses import Does, draw, ids, loss_of

from singd_torch import SINGD


def assert_without_rows(model: nn.Module, name: str, reason: str, *args: Tensor) -> None:
    """The layer trains, the table and a warning say why without rows, and others keep theirs."""
    optimizer, before = SINGD(model), copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(*args)).backward()
            optimizer.step()
    again = SINGD(model)
    again.load_state_dict(optimizer.state_dict())
    assert repr(again) == repr(optimizer)
    saved, loaded = optimizer.state_dict()["state"], again.state_dict()["state"]
    torch.testing.assert_close(loaded, saved, rtol=0.0, atol=0.0)
    assert [str(w.message) for w in warned if name in str(w.message) and reason in str(w.message)]
    lines = {re.split(r"  +| \+ ", line)[0]: line for line in repr(optimizer).splitlines()[2:]}
    assert "SINGD without rows" in lines[name]
    assert reason in lines[name]
    assert sum("without rows" in line for line in lines.values()) == 1
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)
    assert optimizer.skipped == 0


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class BiasAdded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class BiasApart(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2 + self.bias


COMPUTED = {
    "masked": (Masked(5, 5), (9, 5), "tril"),
    "scaled": (Scaled(5, 4), (9, 5), "mul"),
    "standardized": (Standardized(3, 4, 2), (5, 3, 4, 4), "flatten"),
    "bias apart": (BiasApart(5, 4), (9, 5), "add"),
    "bias added": (
        BiasAdded(5, 4),
        (9, 5),
        "a bias that torch.Tensor.add is handed alone (hand both to one call, such as F.linear)",
    ),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights_are_trained_without_rows(case: str) -> None:
    module, shape, reason = COMPUTED[case]
    model = nn.Sequential(copy.deepcopy(module)).double()
    assert_without_rows(model, "0.weight", reason, draw(*shape))


def test_weight_used_by_its_module_and_in_a_way_that_is_not_seen() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.layer(x) @ (2 * m.layer.weight)

    model = Does(call, layer=nn.Linear(5, 4)).double()
    assert_without_rows(model, "layer.weight", "used by torch.Tensor.mul", draw(9, 5))


BAGS = {
    "of the largest": lambda m, x: F.embedding_bag(x, m.table.weight, mode="max"),
    "scaled": lambda m, x: F.embedding_bag(x, m.table.weight, scale_grad_by_freq=True),
    "nested": lambda m, x: F.embedding_bag(
        torch.nested.nested_tensor(list(x), layout=torch.jagged), m.table.weight
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", BAGS)
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_bags_whose_gradients_are_others(case: str, table: type[nn.Module]) -> None:
    model = Does(BAGS[case], table=table(9, 4)).double()
    assert_without_rows(model, "table.weight", "used by torch.nn.functional.embedding_bag", ids())


@pytest.mark.filterwarnings("ignore:no rows of '0.weight' are taken")
def test_recipes_that_need_rows_leave_computed_weights_to_adamw() -> None:
    model = nn.Sequential(Masked(5, 5))
    optimizer = SINGD(model, recipe="paper")
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(torch.randn(9, 5))).backward()
        optimizer.step()
    assert [line.split()[2] for line in repr(optimizer).splitlines()[2:]] == ["AdamW", "AdamW"]
    assert optimizer.skipped == 0


def test_recurrent_layers_say_why() -> None:
    for layer in (nn.LSTM(4, 4), nn.GRU(4, 4), nn.RNN(4, 4)):
        text = repr(SINGD(layer))
        assert text.count(f"torch's kernel of {type(layer).__name__} gives none") == 2


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down = nn.Parameter(torch.ones(2, 4))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)  # type: ignore[no-untyped-call]


class Positions(nn.Module):
    """What is added to the outputs of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table, self.token = (nn.Parameter(torch.zeros(1, n, 4)) for n in (3, 1))


class Own(nn.Module):
    """A layer of another library, of one input, which may be named as a layer of torch is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


WITHOUT_ROWS = {
    "weight normalized": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "a parametrization computes with it",
    ),
    "spectral": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        "a parametrization computes with it",
    ),
    "pruned": (pruned, "Linear is a layer of its 'weight', and not of 'weight_orig'"),
    "adapted": (Adapted, "Adapted is a layer of its 'weight', and not of 'down'"),
    "bounded": (lambda: nn.Embedding(4, 4, max_norm=1.0), "gives none with its arguments"),
    "bags": (lambda: nn.EmbeddingBag(4, 4, mode="max"), "gives none with its arguments"),
    "own": (Own, " Own is not in the table of layers: register_layer"),
    "as torch's": (
        type("Linear", (Own,), {}),
        f" {__name__}.Linear is not in the table of layers: register_layer",
    ),
    "added": (
        Positions,
        "a parameter of Positions itself; to have rows of a product with it, put it",
    ),
}


def test_what_is_no_matrix_has_no_reason() -> None:
    line = next(one for one in repr(SINGD(Positions())).splitlines() if one.startswith("token"))
    assert line.split() == ["token", "1×1×4", "AdamW", "32"]


def test_complex_numbers_are_the_reason() -> None:
    lines = repr(SINGD(nn.Linear(4, 3, dtype=torch.complex64))).splitlines()
    assert [line.split()[2:] for line in lines[2:]] == [
        ["AdamW", "192", "of", "complex", "numbers"],
        ["AdamW", "48"],
    ]


@pytest.mark.parametrize("case", WITHOUT_ROWS)
def test_matrices_of_other_modules_say_why(case: str) -> None:
    make, reason = WITHOUT_ROWS[case]
    lines = [line for line in repr(SINGD(make())).splitlines() if "SINGD without rows" in line]
    assert [reason in line for line in lines] == [True]


class Inside(nn.Module):
    """A layer that an operator calls, which torch traces for it."""

    def __init__(self, operator: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 5), nn.Linear(5, 5)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.inner, self.first(x))


OPERATORS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cond": lambda call, x: torch.cond(x.sum() > -100.0, call, torch.tanh, (x,)),
    "map": lambda call, x: map_(call, x),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_calls_inside_an_operator_give_no_rows_and_train(operator: str) -> None:
    model = Inside(OPERATORS[operator])
    assert_without_rows(model, "inner.weight", operator, draw(6, 4).float())


def test_checkpointed_functions_give_no_rows_and_train() -> None:
    """They are called again in the backward pass, by nobody who watches."""

    def call(m: Any, x: Tensor) -> Tensor:
        h = m.inner(m.table(x))
        return checkpoint(lambda h: F.linear(h, m.table.weight), h, use_reentrant=False)

    model = Does(call, table=nn.Embedding(9, 4), inner=nn.Linear(4, 4)).double()
    assert_without_rows(model, "table.weight", "checkpointed", ids())


IN_PLACE = {
    "linear": (nn.Linear(6, 6), "layer.weight"),
    "convolution": (nn.Conv1d(6, 6, 1), "layer.weight"),
    "attention": (nn.MultiheadAttention(6, 2), "layer.in_proj_weight"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_an_input_of_which_autocast_has_made_a_copy_may_be_changed_in_place(case: str) -> None:
    layer, name = IN_PLACE[case]

    def call(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = m.first(x).float() * 1.0
            x += m.layer(x, x, x)[0] if case == "attention" else m.layer(x)
            return m.last(x).float()  # type: ignore[no-any-return]

    layers = {"first": nn.Linear(6, 6), "layer": copy.deepcopy(layer), "last": nn.Linear(6, 6)}
    assert_without_rows(Does(call, **layers), name, "changed in place", torch.randn(4, 6, 6))
