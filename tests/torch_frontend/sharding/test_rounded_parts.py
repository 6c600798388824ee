"""Models of 16 bits in parts: each weight is rounded by the bits that it has in one process."""

from typing import Any

import gloo
import models
import pytest
import torch
from test_fully_shard import shard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from singd_torch import SINGD

# Short steps are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.*the rate is the size of a step")

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "parts of diagonal layers": {"structures": ("diagonal", "diagonal")},
    "kahan": {"rounding": "kahan"},
}
# Short steps: sums over processes in another order change few of the roundings.
RATES = {"lr": 1e-3, "fallback_lr": 1e-4, "warmup": 0}


def trained(name: str, given: dict[str, Any], rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    model = models.new(name).bfloat16()
    if world > 1:
        model = shard(model, init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, **models.settings(name, **RATES, **given))
    models.train(model, optimizer, models.data(name, steps=3), rank, world)
    return models.weights(model)


def of_one(rank: int, world: int, name: str, given: dict[str, Any]) -> dict[str, Tensor]:
    return trained(name, given, rank, world)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    same = [(found[name] == p).flatten() for name, p in expected.items()]
    return float(torch.cat(same).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_round_as_one_does(case: str) -> None:
    given = CASES[case]
    expected, start = (
        trained("characters", given),
        models.weights(models.new("characters").bfloat16()),
    )
    found = gloo.run(2, of_one, "characters", given)
    for each in found:
        assert all(map(torch.equal, each.values(), found[0].values()))
        assert equal(each, expected) > 0.93
    if case != "kahan":
        other = trained("characters", given | {"seed": 1})
        assert equal(other, expected) < 0.9
    assert equal(expected, start) < 0.8
