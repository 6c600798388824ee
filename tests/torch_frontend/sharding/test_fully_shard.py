"""fully_shard: processes that have parts of the weights train like one that has them whole."""

import itertools
from typing import Any

import gloo
import models
import pytest
from cases import cases
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from singd_torch import SINGD

# In float64: sums over rows and processes in other orders.
CLOSE = 1e-12

STRUCTURES = {
    "default": {},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:5", "blockdiagonal:4")},
    "dense": {"structures": ("dense", "dense")},
    "hierarchical": {"structures": ("hierarchical:2,3", "tril")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
}
SETTINGS = {
    "paper": {"recipe": "paper", "T": 2},
    "kfac": {"kfac": True},
    "no momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.1},
    "coupled decay": {"recipe": "paper", "weight_decay": 0.1},
    "reduce": {"kfac_approx": "reduce"},
}


def shard(model: nn.Module, mesh: Any, **given: Any) -> nn.Module:
    for part in models.parts(model):
        fully_shard(part, mesh=mesh, **given)
    fully_shard(model, mesh=mesh, **given)
    return model


def sharded(rank: int, world: int, name: str, given: dict[str, Any]) -> dict[str, Tensor]:
    model = shard(models.new(name), init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, **models.settings(name, **given))
    models.train(model, optimizer, models.data(name), rank, world)
    return models.weights(model)


def whole(name: str, given: dict[str, Any]) -> dict[str, Tensor]:
    model = models.new(name)
    optimizer = SINGD(model, **models.settings(name, **given))
    models.train(model, optimizer, models.data(name))
    return models.weights(model)


def check(found: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    for each in found:
        assert each.keys() == wanted.keys()
        for key, p in wanted.items():
            assert (each[key] - p).abs().max() <= CLOSE, key


# Each kind of structures once, with one of the models.
FAST = {
    ("characters", "default"),
    ("characters", "hierarchical"),
    ("characters", "blocks"),
    ("images", "default"),
    ("images", "diagonal"),
    ("images", "dense"),
    ("images", "toeplitz"),
}


@pytest.mark.parametrize(
    ("name", "case"),
    cases(itertools.product(["characters", "images"], STRUCTURES), fast=FAST),
)
def test_two_processes_train_like_one(name: str, case: str) -> None:
    check(gloo.run(2, sharded, name, STRUCTURES[case]), whole(name, STRUCTURES[case]))


@pytest.mark.parametrize("case", SETTINGS)
def test_two_processes_train_like_one_with_other_settings(case: str) -> None:
    name = "convolutions" if case == "reduce" else "tied"
    check(gloo.run(2, sharded, name, SETTINGS[case]), whole(name, SETTINGS[case]))


def test_matrices_without_rows() -> None:
    assert "SINGD without rows" in repr(SINGD(models.new("experts")))
    check(gloo.run(2, sharded, "experts", {}), whole("experts", {}))


@pytest.mark.slow
@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.parametrize("name", ["tied", "images"])
def test_four_processes_train_like_one(name: str, case: str) -> None:
    check(gloo.run(4, sharded, name, STRUCTURES[case]), whole(name, STRUCTURES[case]))
