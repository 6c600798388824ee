"""Sums of rows leave while a backward pass runs, and hold the rows that count alone."""

import math
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch
import torch.distributed as dist
import watched
from test_fully_shard import check, shard
from test_meshes import parted
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD
from singd_torch.sharding import stream

NAME = "characters"
BUCKET = 12_000  # bytes
GIVEN = models.settings(NAME, T=1, growing_T=False)


def changing(rank: int, world: int) -> dict[str, Tensor]:
    """Backward passes that are more or fewer than in the step before, or do not count."""
    model: Any = models.new(NAME)
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    later = [*model.norm.parameters()]
    first = [p for p in model.parameters() if all(p is not q for q in later)]
    optimizer = SINGD(model, first, **GIVEN)

    def backward(batch: models.Data, i: int = 0, n: int = 1) -> None:
        own = models.part_of(models.part_of(batch, rank, world), i, n)
        (models.loss(model, *own) / n).backward()

    batches = models.data(NAME, 8)
    for step, n in enumerate([1, 1, 2, 2, 1, 1, 1, 2]):
        if step in (5, 6):  # a pass whose sums have left, and that does not count
            backward(batches[0])
            (model if step == 5 else optimizer).zero_grad()
        for i in range(n):
            backward(batches[step], i, n)
        if step == 3:  # all layers are found anew, when sums have left
            optimizer.add_param_group({"params": later})
        optimizer.step()
        model.zero_grad()
    return models.weights(model)


def streamed(rank: int, world: int) -> dict[str, Tensor]:
    with models.exact_counts(), mock.patch.object(stream, "BUCKET", BUCKET):
        return changing(rank, world)


@pytest.mark.slow
def test_whatever_passes_there_are_two_processes_do_as_one() -> None:
    with models.exact_counts():
        wanted = changing(0, 1)
    check(gloo.run(2, streamed), wanted)


class Choice(nn.Module):
    """Of two layers a batch uses the first, the second, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, which: tuple[int, ...]) -> Tensor:
        layers = self.first, self.second
        y: Tensor = self.head(torch.stack([layers[i](x) for i in which]).sum(0).tanh())
        return y


def chosen(rank: int, world: int) -> dict[str, Tensor]:
    """Passes in which processes use other layers. Some of the passes do not count."""
    torch.manual_seed(0)
    model: Any = Choice().double()
    wrapped = model
    if world > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SINGD(wrapped, T=1, growing_T=False, rows=math.inf, shard=world > 1)
    draw = torch.Generator().manual_seed(1)
    both = 0, 1
    uses = [(both, both), ((0,), (1,)), (both, (1,)), ((0,), (0,)), (both, both)]
    with mock.patch.object(stream, "BUCKET", 1):
        for step, of_each in enumerate(uses):
            for counts in (False, True)[step == 0 :]:
                batch = torch.randn(8, 4, dtype=torch.float64, generator=draw)
                for i, which in enumerate(of_each):
                    if world == 1 or i == rank:
                        x = batch.chunk(2)[i]
                        (wrapped(x, which).square().mean() * world / 2).backward()
                if counts:
                    optimizer.step()
                optimizer.zero_grad()
    return models.weights(model)


def test_copies_that_use_other_layers_wait_for_each_other_in_steps_alone() -> None:
    check(gloo.run(2, chosen), chosen(0, 1))


def measured(rank: int, world: int, how: str) -> Any:
    """The weights, and of each step: the sums sent in its backward pass and in `step`; the bytes.

    Those are of sums that wait here, the most at the end of a call.
    """
    model, index, of = parted(NAME, how, world)
    optimizer = SINGD(model, **GIVEN)
    every = watched.layers(optimizer)
    sent = most = 0
    reduce, took = dist.reduce, stream.Stream.took

    def counted(flat: Tensor, *args: Any, **given: Any) -> Any:
        nonlocal sent
        sent += flat.numel()
        return reduce(flat, *args, **given)

    def then_held(*args: Any) -> None:
        nonlocal most
        took(*args)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in every
            for pending in layer.pending.values()
            for part in (pending.inputs, pending.outputs)
            for _, t in part.named_arrays()
        }
        most = max(most, sum(held.values()))

    found = []
    with (
        models.exact_counts(),
        mock.patch.object(stream, "BUCKET", BUCKET),
        mock.patch.object(dist, "reduce", counted),
        mock.patch.object(stream.Stream, "took", then_held),
    ):
        for batch in models.data(NAME):
            optimizer.zero_grad()
            sent = most = 0
            models.loss(model, *models.part_of(batch, index, of)).backward()
            early, sent = sent, 0
            optimizer.step()
            found.append((early, sent, most))
    return models.weights(model), found


def check_streamed(world: int, how: str) -> None:
    model = models.new(NAME)
    optimizer = SINGD(model, **GIVEN)
    models.train(model, optimizer, models.data(NAME))
    each = [stream.bytes_of_sums(layer) for layer in watched.layers(optimizer)]
    found = gloo.run(world, measured, how)
    check([weights for weights, _ in found], dict(model.named_parameters()))
    for _, (first, *others) in found:
        assert first[0] == 0  # nobody knows the order of layers
        for early, late, most in others:
            assert (early, late) == (first[1], 0)
            assert 0 < most <= BUCKET + max(each) + 100 < sum(each) / 2


def test_all_sums_are_sent_while_the_backward_pass_runs() -> None:
    check_streamed(2, "replicate")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hybrid", "data and tensor", "tensor"])
def test_four_processes_send_sums_while_the_backward_pass_runs(how: str) -> None:
    check_streamed(4, how)
