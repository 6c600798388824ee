"""fully_shard: processes that have parts of the weights train like one that has them whole."""

import itertools
from typing import Any

import gloo
import models
import pytest
import torch
from cases import cases
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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
    ("images", "blocks"),
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


@pytest.mark.parametrize("case", cases(SETTINGS, fast=["coupled decay", "paper", "reduce"]))
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


def from_rate_zero(rank: int, world: int, kind: str) -> tuple[Tensor, int]:
    """The weights and the steps of a warm-up from 0; one process may have no samples at first."""
    torch.manual_seed(0)
    layers = {"layers": nn.Linear(6, 4), "no rows": nn.LSTM(6, 4, batch_first=True)}
    model = layers[kind].double()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, T=1)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.04 * step
        x = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64)
        own = x if world == 1 else x[:0] if rank and step == 0 and kind == "layers" else x
        optimizer.zero_grad()
        y = model(own)
        y = y[0] if isinstance(y, tuple) else y
        (y.square().sum() / (24.0 if len(own) else 1.0)).backward()
        optimizer.step()
    p = next(model.parameters())
    weight = p.full_tensor() if isinstance(p, DTensor) else p
    return weight.detach(), optimizer.param_groups[0]["steps"]


@pytest.mark.parametrize("kind", ["layers", "no rows"])
def test_a_first_step_of_rate_zero_is_one_for_all_processes(kind: str) -> None:
    (one, n), (two, m) = gloo.run(2, from_rate_zero, kind)
    assert n == m == 4
    assert torch.equal(one, two)
    if kind == "no rows":  # where both have the whole batch
        torch.testing.assert_close(one, from_rate_zero(0, 1, kind)[0], rtol=CLOSE, atol=CLOSE)
