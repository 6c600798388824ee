"""Copies of a model whose wrapper is compiled, as trainers do after the optimizer was built."""

from typing import Any

import gloo
import models
import pytest
import torch
from test_fully_shard import check, whole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

NAME = "characters"


def compiled(rank: int, world: int) -> dict[str, Tensor]:
    model = models.new(NAME)
    optimizer = SINGD(model, **models.settings(NAME))
    wrapped: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    models.train(wrapped, optimizer, models.data(NAME), rank, world)
    return models.weights(model)


@pytest.mark.slow
def test_copies_in_a_wrapper_that_is_compiled_train_like_one_process() -> None:
    check(gloo.run(2, compiled), whole(NAME, {}))


def one_of_two_is_there(rank: int, world: int) -> list[bool]:
    """Whether processes are known around a part of a model, and after the wrapper is gone."""
    part, found = nn.Linear(3, 2), []
    model = nn.Sequential(nn.Linear(4, 3), part)
    wrapped = DistributedDataParallel(part)
    for _ in range(2):
        optimizer = SINGD(model)
        optimizer.step()
        found.append(optimizer._stepper.processes is wrapped.process_group if wrapped else False)
        assert found[-1] or optimizer._stepper.processes is None
        wrapped = None  # type: ignore[assignment]
    return found


def test_a_wrapper_is_found_that_no_call_has_told() -> None:
    assert gloo.run(2, one_of_two_is_there) == [[True, False]] * 2
