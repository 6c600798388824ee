"""Layers whose rows nobody sees, until they are seen: several processes do as one."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import gloo
import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_fully_shard import check, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from watched import Product, table

from singd_torch import SINGD


def build(rank: int, world: int, how: str) -> tuple[Any, SINGD]:
    model: Any = models.new("convolutions")
    if how == "fully_shard":
        model = shard(model, init_device_mesh("cpu", (world,)))
    elif how != "alone":
        model = DistributedDataParallel(model)
    return model, fresh(model, how)


def fresh(model: Any, how: str) -> SINGD:
    shard_state = how == "copies that part the state"
    return SINGD(model, shard=shard_state, **models.settings("convolutions"))


def train(model: Any, optimizer: SINGD, batches: Any, rank: int, world: int, seen: bool) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss = models.loss(model, *models.part_of(batch, rank, world))
        if seen:
            loss.backward()
        else:
            with optimizer.no_rows():
                loss.backward()
        optimizer.step()


def run(rank: int, world: int, how: str) -> tuple[dict[str, Tensor], int, int]:
    """The weights, and how many layers were without rows in the end and in between."""
    model, optimizer = build(rank, world, how)
    batches = models.data("convolutions", 9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no rows of .* have been seen")
        train(model, optimizer, batches[:3], rank, world, False)
        between = repr(optimizer).count("SINGD without rows")
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = fresh(model, how)
        optimizer.load_state_dict(state)
        assert repr(optimizer).count("SINGD without rows") == between
        train(model, optimizer, batches[3:5], rank, world, False)
        train(model, optimizer, batches[5:], rank, world, True)
    end = repr(optimizer).count("SINGD without rows")
    return models.weights(getattr(model, "module", model)), between, end


@pytest.mark.parametrize(
    "how",
    [
        "fully_shard",
        pytest.param("copies", marks=pytest.mark.slow),
        "copies that part the state",
    ],
)
def test_two_processes_do_as_one(how: str) -> None:
    wanted, *counts = run(0, 1, "alone")
    assert counts == [3, 0]
    found = gloo.run(2, run, how)
    assert [own[1:] for own in found] == [(3, 0), (3, 0)]
    check([weights for weights, *_ in found], wanted)


# What a process warns of, the rule of each parameter, and the weights.
Ended = tuple[list[str], dict[str, str], dict[str, Tensor]]


def end(rank: int, world: int, part: Callable[[Any, Tensor], Tensor]) -> Ended:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = SINGD(model, processes=dist.group.WORLD)
    torch.manual_seed(1 + rank)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            x = torch.randn(16, 4).double().requires_grad_()
            loss = F.cross_entropy(model(x), x.argmax(1) % 3)
            if rank == 1:
                loss = loss + part(model, x)
            optimizer.zero_grad()
            loss.backward()
            for p in model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad.div_(world))
            optimizer.step()
    return [str(warning.message) for warning in found], table(optimizer), models.weights(model)


def used_where_no_call_is_seen(model: Any, x: Tensor) -> Tensor:
    return Product.apply(x, model[0].weight).cos().mean()


def derivative(model: Any, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(model[0](x).sin().sum(), x, create_graph=True)
    return slope.square().sum()


def ends(rank: int, world: int) -> list[Ended]:
    return [end(rank, world, part) for part in (used_where_no_call_is_seen, derivative)]


@pytest.mark.slow
def test_what_one_process_alone_finds_out_holds_for_all() -> None:
    """All warn of a use that is not seen, and nobody of derivatives in the loss."""
    (unseen, by_choice), (unseen_there, by_choice_there) = gloo.run(2, ends)
    for one, other in ((unseen, unseen_there), (by_choice, by_choice_there)):
        assert one[1] == other[1]
        assert Counter(one[1].values()) == {"SINGD": 2, "SINGD without rows": 2}  # and its bias
        check([other[2]], one[2])
    assert not by_choice[0]
    assert not by_choice_there[0]
    (found,), (found_there,) = unseen[0], unseen_there[0]
    assert "'0.weight' are taken, since it is used on another process" in found
    assert "'0.weight' are taken, since it is used where no call is seen" in found_there
