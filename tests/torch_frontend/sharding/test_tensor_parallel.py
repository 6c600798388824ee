"""Processes that work on the same samples count each of them once, whatever a call looks like."""

import warnings
from collections.abc import Callable
from typing import Any

import gloo
import models
import pytest
import torch
import torch.nn.functional as F
from test_fully_shard import CLOSE
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from watched import Product

from singd_torch import SINGD

# Steps whose sizes depend on how many terms the loss has.
PAPER: dict[str, Any] = {"recipe": "paper", "lr": 0.01, "damping": 1e-3, "T": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return y

    def unseen(self, x: Tensor) -> Tensor:
        """What uses a weight where no call is seen."""
        weight: Any = self.up.weight
        if isinstance(weight, DTensor):
            x = DTensor.from_local(x, weight.device_mesh, [Replicate()])
        y: Any = Product.apply(x, weight)
        return (y.full_tensor() if isinstance(y, DTensor) else y).sin().mean()


class Sequences(nn.Module):
    """A block that has the batch on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.block(torch.stack([x, x.square()])).mean(0))
        return y


def network(world: int) -> Any:
    model = Net().double()
    return _parted(model, world, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _parted(model: nn.Module, world: int, plan: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
    return model if mesh is None else parallelize_module(model, mesh, plan)


def trained(
    model: Any,
    given: dict[str, Any],
    loss: Callable[..., Tensor],
    before: Callable[..., None] | None = None,
) -> dict[str, Tensor]:
    optimizer, draw = SINGD(model, **given), torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(3, 6, generator=draw, dtype=torch.float64)
        y = torch.randint(5, (3,), generator=draw)
        optimizer.zero_grad()
        if before is not None:
            before(optimizer)
        loss(model, x, y).backward()
        optimizer.step()
    return models.weights(model)


def mean(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def terms(world: int) -> dict[str, Tensor]:
    return trained(network(world), PAPER | {"loss_average": 3}, mean)


def masked(world: int) -> dict[str, Tensor]:
    """One process measures a single row, or none."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x)[:1], y[:1])

    mask = torch.tensor([True, False, False])
    return trained(network(world), PAPER, loss, lambda optimizer: optimizer.mask_rows(mask))


def mask_of_others(world: int) -> dict[str, Tensor]:
    """It is not as long as the batch, but as the samples that one process measures."""
    mask = torch.tensor([True, False])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the mask of rows")
        return trained(network(world), PAPER, mean, lambda optimizer: optimizer.mask_rows(mask))


def without_a_batch(world: int) -> dict[str, Tensor]:
    return trained(network(world), PAPER, lambda model, x, y: F.cross_entropy(model(x[0]), y[0]))


def batch_second(world: int) -> dict[str, Tensor]:
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    model = Sequences().double()
    _parted(model.block, world, plan)
    return trained(model, PAPER, mean)


def unseen(world: int) -> dict[str, Tensor]:
    """All processes find out that rows do not tell the gradient of a weight."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + 3 * model.unseen(x)

    with pytest.warns(UserWarning, match="no rows of 'up.weight' are taken"):
        return trained(network(world), {}, loss)


def compiled(world: int) -> dict[str, Tensor]:
    model, mask = network(world), torch.tensor([True, True, False])
    model.compile(backend="aot_eager")
    return trained(model, PAPER, mean, lambda optimizer: optimizer.mask_rows(mask))


CASES = terms, masked, mask_of_others, without_a_batch, batch_second, unseen, compiled


def run(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        found[case.__name__] = case(world)
    return found


@pytest.mark.slow
def test_two_processes_do_as_one() -> None:
    wanted = run(0, 1)
    for found in gloo.run(2, run):
        for case, weights in wanted.items():
            for key, p in weights.items():
                assert (found[case][key] - p).abs().max() <= CLOSE, (case, key)


def compiled_in_parts(rank: int, world: int) -> dict[str, Tensor]:
    """Compiled blocks, as trainers have them: parts of their weights along two axes of a mesh."""
    torch.manual_seed(0)
    model = nn.Sequential(Net(), nn.Tanh(), nn.Linear(5, 5)).double()
    mesh = None
    if world > 1:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model[0], mesh["tensor"], plan)
    model[0].compile(backend="aot_eager")
    if mesh is not None:
        fully_shard(model[0], mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.repeat(2, 1), y.repeat(2)
        x[3:] *= 0.5
        if mesh is not None:
            x, y = (t.chunk(2)[mesh["data"].get_local_rank()] for t in (x, y))
        return mean(model, x, y)

    return trained(model, PAPER, loss)


@pytest.mark.slow
def test_four_processes_do_as_one_in_compiled_blocks() -> None:
    wanted = compiled_in_parts(0, 1)
    for found in gloo.run(4, compiled_in_parts):
        for key, p in wanted.items():
            assert (found[key] - p).abs().max() <= CLOSE, key
