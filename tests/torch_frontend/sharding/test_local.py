"""Layers whose factor along the parted axis is diagonal: nothing but numbers are sent in a step."""

import copy
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import watched
from test_costs import Counted
from test_fully_shard import check
from test_meshes import parted

from singd_torch import SINGD
from singd_torch.sharding.local import norms
from singd_torch.tensors import pieces

DIAGONAL: dict[str, Any] = {"structures": ("diagonal", "diagonal"), "T": 3, "growing_T": False}
CASES: dict[str, dict[str, Any]] = {
    "diagonal": DIAGONAL,
    "blocks of inputs": DIAGONAL | {"structures": ("blockdiagonal:5", "diagonal")},
    "toeplitz inputs": DIAGONAL | {"structures": ("triltoeplitz", "diagonal")},
    "as in the paper": DIAGONAL | {"kfac_like": False, "alpha1": 0.5},
    "no momentum": DIAGONAL | {"momentum": 0.0},
    "no nesterov": DIAGONAL | {"nesterov": False},
    "decay": DIAGONAL | {"weight_decay": 0.1},
    "coupled decay": DIAGONAL | {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "recipe of the paper": DIAGONAL | {"recipe": "paper"},
    "its momentum and decay": DIAGONAL
    | {"recipe": "paper", "weight_decay": 0.1, "alpha1": 0.5, "nesterov": True},
    "blocks of inputs, of the paper": DIAGONAL
    | {"recipe": "paper", "structures": ("blockdiagonal:5", "diagonal"), "momentum": 0.0},
}


def trained(rank: int, world: int, name: str, how: str, given: Any) -> Any:
    """The weights after five steps with a checkpoint, what the second sent, and the table."""
    model, index, of = parted(name, how, world)
    optimizer = SINGD(model, **models.settings(name, **given))
    batches = models.data(name, 5)
    models.train(model, optimizer, batches[:1], index, of)
    optimizer.zero_grad()
    models.loss(model, *models.part_of(batches[1], index, of)).backward()
    with models.exact_counts(), Counted() as counted:
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    models.train(model, optimizer, batches[2:], index, of)
    return models.weights(model), (counted.calls, counted.numbers), repr(optimizer)


def alone(name: str, given: dict[str, Any]) -> Any:
    model = models.new(name)
    optimizer = SINGD(model, **models.settings(name, **given))
    models.train(model, optimizer, models.data(name, 5))
    return models.weights(model)


def check_local(
    world: int, name: str, how: str, given: dict[str, Any], others: int = 0, moved: int = 0
) -> None:
    """All but so many layers are stepped by all processes.

    A step sums norms of matrices and of biases that are apart. `moved` are the rows of weights that
    are parted by columns, beside such biases: what they move along the means of their inputs.
    """
    found = gloo.run(world, trained, name, how, given)
    check([weights for weights, *_ in found], alone(name, given))
    for _, (calls, numbers), text in found:
        layers = [line for line in text.splitlines() if "  SINGD" in line]
        by_all = [line for line in layers if "  all  " in line]
        assert len(by_all) == len(layers) - others
        if not others:
            assert calls == {"all_reduce": 2}
            matrices = watched.layers(SINGD(models.new(name), **models.settings(name, **given)))
            assert numbers == {"all_reduce": 1 + sum(map(norms, matrices)) + moved}


def test_two_processes_send_nothing_but_numbers() -> None:
    check_local(2, "characters", "parts", DIAGONAL)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_other_settings(case: str) -> None:
    given = CASES[case]
    check_local(2, "characters", "parts", given)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("name", ["convolutions", "tied", "images", "experts", "transposed"])
def test_two_processes_with_other_models(name: str, recipe: str) -> None:
    check_local(2, name, "parts", DIAGONAL | {"recipe": recipe})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "others", "moved"),
    [
        ("columns", 6, 0),  # biases by rows, beside weights by columns: these have owners
        ("replicate", 14, 0),
        ("tensor", 0, 2 * (16 + 16)),
        ("sequence", 0, 2 * (16 + 16)),
    ],
)
def test_two_processes_on_other_meshes(how: str, others: int, moved: int) -> None:
    check_local(2, "characters", how, DIAGONAL, others, moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "moved"), [("parts", 0), ("hybrid", 0), ("data and tensor", 2 * (16 + 16))]
)
def test_four_processes(how: str, moved: int) -> None:
    check_local(4, "characters", how, DIAGONAL, moved=moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "experts"])  # some have nothing of some weights
def test_four_processes_with_weights_of_few_rows(name: str) -> None:
    check_local(4, name, "parts", DIAGONAL)


def on_accelerators(rank: int, world: int, given: dict[str, Any]) -> Any:
    with mock.patch.object(pieces, "on_host", return_value=False):
        return trained(rank, world, "characters", "parts", given)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_with_accelerators(case: str) -> None:
    given = CASES[case] | {"fallback_lr": 0.0}
    with mock.patch.object(pieces, "on_host", return_value=False):
        wanted = alone("characters", given)
    check(gloo.run(2, on_accelerators, given), wanted)
