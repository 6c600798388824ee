"""Sampled labels with copies of a model: the wrapper averages the pass of the loss alone."""

import contextlib
from typing import Any

import gloo
import models
import pytest
from test_fully_shard import check
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

NAME = "tied"


def of_one_forward_pass(rank: int, world: int) -> str:
    wrapped: Any = DistributedDataParallel(models.new(NAME))
    optimizer = SINGD(wrapped)
    x, y = models.part_of(models.data(NAME)[0], rank, world)
    logits = wrapped(x).flatten(0, -2)
    with optimizer.sampled_labels():
        cross_entropy(logits, (7 * y.flatten()) % 20).backward(retain_graph=True)
    try:
        cross_entropy(logits, y.flatten()).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_wrapper_that_has_averaged_the_pass_of_sampled_labels_is_an_error() -> None:
    for found in gloo.run(2, of_one_forward_pass):
        assert "wrapped.no_sync(), optimizer.sampled_labels()" in found


def of_two(rank: int, world: int, quiet: bool) -> dict[str, Tensor]:
    """Two micro-batches a step; the wrapper may average sampled labels too, in the same memory."""
    wrapped: Any = models.new(NAME)
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
    optimizer = SINGD(wrapped, **models.settings(NAME))

    def alone(is_so: bool) -> contextlib.AbstractContextManager[Any]:
        return wrapped.no_sync() if world > 1 and is_so else contextlib.nullcontext()

    with models.exact_counts():
        for batch in models.data(NAME):
            optimizer.zero_grad(set_to_none=False)
            for i in range(2):
                x, y = models.part_of(models.part_of(batch, rank, world), i, 2)
                with alone(quiet), optimizer.sampled_labels():
                    (models.loss(wrapped, x, (7 * y) % 20) / 2).backward()
                with alone(i == 0):
                    (models.loss(wrapped, x, y) / 2).backward()
            optimizer.step()
    return models.weights(getattr(wrapped, "module", wrapped))


@pytest.mark.parametrize("quiet", [pytest.param(True, marks=pytest.mark.slow), False])
def test_copies_take_rows_of_sampled_labels_as_one_process_does(quiet: bool) -> None:
    check(gloo.run(2, of_two, quiet), of_two(0, 1, quiet))
