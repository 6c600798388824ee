"""Copies of model and optimizer, and of the model alone."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import F32, Network, all_numbers, assert_equal, batches, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
        assert not any(layer.pending for layer in optimizer._layers)
    train(plain, alone, data)
    assert_equal(all_numbers(model, optimizer), all_numbers(plain, alone))
