"""What a model in parts costs: bytes of state, numbers that are sent, and calls."""

from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch
import torch.distributed as dist
import watched
from test_fully_shard import shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD, estimate
from singd_torch._distributed import another
from singd_torch.sharding import boxes, exchange

GIVEN = {"T": 2, "growing_T": False}


class Counted:
    """Counts the calls of collectives, and the numbers that they send to other processes."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()
        self.sizes: list[int] = []

    def all_to_all_single(self, out: Any, sent: Any, *sizes: Any, group: Any) -> None:
        mine = sizes[1][dist.get_rank(group)]
        self.calls["all_to_all"] += 1
        self.sizes += [sent.numel(), out.numel()]
        self.numbers["all_to_all"] += sent.numel() - mine
        self._all_to_all(out, sent, *sizes, group=group)

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls["all_reduce"] += 1
        self.numbers["all_reduce"] += tensor.numel()
        return self._all_reduce(tensor, *args, **kwargs)

    def reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls["reduce"] += 1
        self.numbers["reduce"] += tensor.numel()
        return self._reduce(tensor, *args, **kwargs)

    def __enter__(self) -> "Counted":
        self._all_to_all, self._all_reduce = dist.all_to_all_single, dist.all_reduce
        self._reduce = dist.reduce
        names = ("all_to_all_single", "all_reduce", "reduce")
        patches = [mock.patch.object(dist, name, getattr(self, name)) for name in names]
        for patch in patches:
            patch.start()
        self._stop = [patch.stop for patch in patches]
        return self

    def __exit__(self, *args: Any) -> None:
        for stop in self._stop:
            stop()
        del self._stop, self._all_to_all, self._all_reduce, self._reduce


def made(world: int, how: str) -> tuple[Any, SINGD]:
    """A model in parts, or copies that part the state, and its optimizer."""
    model: Any = models.new("characters")
    if how == "copies":
        model = DistributedDataParallel(model)
    else:
        shard(model, init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, shard=how == "copies", **models.settings("characters", **GIVEN))
    return model, optimizer


def steps(rank: int, world: int, how: str) -> list[tuple[Counted, Counted]]:
    """What was sent by each backward pass, and by each step."""
    model, optimizer = made(world, how)
    found = []
    for batch in models.data("characters"):
        optimizer.zero_grad()
        with Counted() as before:
            models.loss(model, *models.part_of(batch, rank, world)).backward()
        with Counted() as counted:
            optimizer.step()
        found.append((before, counted))
    return found


@pytest.mark.parametrize("how", ["parts", "copies"])
def test_a_step_sends_gradients_and_changes_once_and_the_backward_pass_sums(how: str) -> None:
    world = 2
    model = models.new("characters")
    layers = watched.layers(SINGD(model))
    # the factor of a table's entries is diagonal: where it is in parts, each process steps its own
    local = [layer for layer in layers if layer.name == "table.weight" and how == "parts"]
    owned = [layer for layer in layers if layer not in local]
    of_layers = sum(p.numel() for layer in owned for p in layer.parameters)
    found = gloo.run(world, steps, how)
    for step in range(1, models.STEPS):  # before the first, nobody knows who has rows
        refresh = step % 2 == 0
        compared = how == "copies" and step + 1 in (2, 4)  # gradients, by their norms
        for early, now in (each[step] for each in found):
            sums = {"reduce": 2, "all_reduce": len(local)} if refresh else {}
            exchanges = 2 if how == "parts" else 1  # each owner has the gradients of a copy
            calls = {"all_to_all": exchanges, "all_reduce": 1 + len(local) + refresh + compared}
            assert early.calls == +Counter(sums)
            assert now.calls == Counter(calls)
            # whether all is finite, norms, and what each layer has met: rows of both kinds or none
            numbers = 1 + 3 * len(local) + 6 * len(layers) * refresh
            numbers += 2 * sum(len(layer.parameters) for layer in layers) * compared
            assert now.numbers["all_reduce"] == numbers
            assert early.numbers["all_reduce"] == sums_of(local) * refresh
            assert early.numbers["reduce"] == sums_of(owned) * refresh
        sent = sum(each[step][1].numbers["all_to_all"] for each in found)
        there = 0 if how == "copies" else of_layers * (world - 1) / world
        back = of_layers * (world - 1) * (1 if how == "copies" else 1 / world)
        assert sent == there + back
    if how == "parts":
        told = estimate(model, processes=world)
        assert told.sent_by_step == 8 * sent / world + 24 * len(local)
        sums = sums_of(layers) - 4 * len(layers)
        assert told.sent_by_refresh == 8 * sums * (world - 1) / world


def together(rank: int, world: int, how: str, most: int) -> tuple[int, list[int], torch.Tensor]:
    """The all-to-alls of a last step, the largest numbers of one, and the weights after it."""
    model, optimizer = made(world, how)
    exchange._TOGETHER = most
    sizes: list[int] = []
    for batch in models.data("characters"):
        optimizer.zero_grad()
        models.loss(model, *models.part_of(batch, rank, world)).backward()
        with Counted() as counted:
            optimizer.step()
        sizes = counted.sizes
    weights = models.weights(model.module if how == "copies" else model)
    flat = torch.cat([weights[name].reshape(-1) for name in sorted(weights)])
    return counted.calls["all_to_all"], sizes, flat


@pytest.mark.parametrize("how", ["parts", "copies"])
def test_few_numbers_are_on_their_way_at_once(how: str) -> None:
    found = [gloo.run(2, partial(together, how=how, most=most)) for most in (1 << 22, 1000)]
    for (few, _, weights), (many, sizes, same) in zip(*found, strict=True):
        largest = max(p.numel() for p in models.new("characters").parameters())
        assert many > 2 * few
        assert max(sizes) <= max(1000, largest)
        torch.testing.assert_close(same, weights, rtol=1e-12, atol=0)


def asked(rank: int, world: int, how: str) -> list[bool]:
    """Whether sums and changes are called for in the group of the training, and maxima are not."""
    model: Any = models.new("characters")
    if how == "parts":
        shard(model, init_device_mesh("cpu", (world,)))
    else:
        model = DistributedDataParallel(model)
    optimizer = SINGD(model, **models.settings("characters", T=1, growing_T=False))
    training = dist.group.WORLD
    found = []
    all_reduce = dist.all_reduce

    def seen(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **given: Any) -> Any:
        found.append((op == dist.ReduceOp.MAX) is (given["group"] is not training))
        return all_reduce(tensor, op, **given)

    for batch in models.data("characters", 2):
        models.loss(model, *models.part_of(batch, rank, world)).backward()
        with mock.patch.object(dist, "all_reduce", seen):
            optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parts", "copies"])
def test_what_the_host_asks_meets_no_calls_of_a_save_in_another_thread(how: str) -> None:
    for found in gloo.run(2, asked, how):
        assert len(found) >= 2
        assert all(found)


def sums_of(layers: list[Any]) -> int:
    """The numbers that a refresh sends: with the squares of both sides, N and M of each layer."""
    shapes = ((layer.shape, layer.structures) for layer in layers)
    return sum(4 + K.numbers(d_in) + C.numbers(d_out) for (_, d_out, d_in), (K, C) in shapes)


def state_bytes(rank: int, world: int) -> int:
    model = shard(models.new("characters"), init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, **models.settings("characters"))
    models.train(model, optimizer, models.data("characters", 1), rank, world)
    tensors = (t for own in optimizer.state.values() for t in own.values() if not t.is_meta)
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)


def test_an_estimate_tells_the_bytes_of_each_process() -> None:
    model: nn.Module = models.new("characters")
    wanted = estimate(model, processes=2)
    assert gloo.run(2, state_bytes) == list(wanted.by_process)
    table = 8 * (20 + 16**2)  # the factors of the table, which both have
    assert sum(wanted.by_process) == wanted.total + table
    assert max(wanted.by_process) <= 1.2 * wanted.total / 2
    assert "on each of 2 processes" in repr(wanted)
    # weights that are rounded, or decay, come to their owner with the gradients
    narrow = partial(estimate, nn.Linear(512, 512).bfloat16(), "dense", processes=2)
    least, decayed = (narrow(rounding="nearest", weight_decay=d) for d in (0.0, 0.1))
    assert narrow(rounding="stochastic").sent_by_step == decayed.sent_by_step > least.sent_by_step
    with pytest.raises(ValueError, match="processes=0"):
        estimate(model, processes=0)


def bound_while_made(rank: int, world: int) -> list[Any]:
    """The device of all processes while a group of all is made, of one alone, and after it."""
    everyone: Any = dist.group.WORLD
    alone = [dist.new_group([i]) for i in range(world)][rank]
    everyone.bound_device_id = torch.device("cuda", 0)  # as init_process_group(device_id=...)
    found = []

    def recorded(*args: Any, **given: Any) -> Any:
        found.append(everyone.bound_device_id)
        return alone

    mesh = mock.Mock(mesh=torch.tensor([[rank]]), ndim=2, size=lambda: 1)
    parts = type("Parts", (), {"device_mesh": mesh})
    with mock.patch.object(dist, "new_group", recorded):
        another(everyone)
        another(alone)
        with mock.patch.object(boxes, "DTensor", parts):
            boxes.group_of_parts([parts()])
    found.append(everyone.bound_device_id)
    everyone.bound_device_id = None  # there is no such device
    return found


def test_a_group_of_some_processes_is_not_split_off_the_group_of_all() -> None:
    """NCCL would wait for the others."""
    device = torch.device("cuda", 0)
    assert gloo.run(2, bound_while_made) == [[device, None, None, device]] * 2
