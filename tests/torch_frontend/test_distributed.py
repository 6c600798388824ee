"""DistributedDataParallel: the whole batch makes the factors, in one all-reduce."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

STEPS = 4
WAYS = ["plain", "wrapped later", "accumulate", "uneven", "frozen at steps"]


class Branches(nn.Module):
    """Attention and two branches. A batch may use one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)  # nothing is asked of it

    def forward(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        x = self.frozen(self.attention(x, x, x)[0])
        return self.head(getattr(self, branch)(x).tanh().mean(1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS, 16), generator=generator)


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return Branches().double()


def backward(model: nn.Module, x: Any, y: Any, branch: str, share: float = 1.0) -> None:
    (nn.functional.cross_entropy(model(x, branch), y) * share).backward()


def train(rank: int, world: int, folder: str, how: str) -> None:
    """One process: its share of each batch; the first saves the weights."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    inner = new_model()
    if how == "wrapped later":  # as Accelerate and Lightning do
        optimizer = SINGD(inner, inner.parameters(), T=2, growing_T=False)
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    if how != "wrapped later":
        optimizer = SINGD(model, model.parameters(), T=2, growing_T=False)
    calls = 0
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    X, Y = data()
    for step in range(STEPS):
        x, y = X[step].chunk(world)[rank], Y[step].chunk(world)[rank]
        optimizer.zero_grad()
        if how == "accumulate":
            with model.no_sync():
                backward(model, x[: len(x) // 2], y[: len(x) // 2], "left", 0.5)
            backward(model, x[len(x) // 2 :], y[len(x) // 2 :], "left", 0.5)
        elif how == "uneven":  # a branch is used by one process only
            backward(model, x, y, "left" if rank == 0 else "right")
        else:
            backward(model, x, y, "left")
        before, trained = calls, [p for p in inner.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(how != "frozen at steps")
        optimizer.step()
        for p in trained:
            p.requires_grad_()
        # which rows there are, and these, at a refresh; a layer that never had any keeps asking
        asks = how not in ("uneven", "frozen at steps")  # if it is trained
        assert calls - before == (2 if step % 2 == 0 or asks else 0), (step, calls)
    weights = [p.detach().clone() for p in model.parameters()]
    gathered = [torch.empty_like(torch.cat([w.flatten() for w in weights])) for _ in range(world)]
    dist.all_gather(gathered, torch.cat([w.flatten() for w in weights]))
    assert all(torch.equal(gathered[0], other) for other in gathered)
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.all_reduce = original
    dist.destroy_process_group()


def train_in_all_ways(rank: int, world: int, folder: str) -> None:
    """One process for all: its start takes longer than what it does."""
    for how in WAYS:
        train(rank, world, f"{folder}/{how}", how)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How many processes have trained, and the folder with what came out of each way."""
    folder = tmp_path_factory.mktemp("trained")
    for how in WAYS:
        (folder / how).mkdir()
    mp.spawn(train_in_all_ways, args=(request.param, str(folder)), nprocs=request.param)
    return request.param, folder


@pytest.mark.parametrize("how", WAYS)
def test_processes_train_like_one_with_the_whole_batch(trained: tuple[int, Path], how: str) -> None:
    world, folder = trained
    model = new_model()
    optimizer = SINGD(model, T=2, growing_T=False)
    X, Y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        if how == "uneven":
            parts = zip(X[step].chunk(world), Y[step].chunk(world), strict=True)
            loss = torch.zeros((), dtype=torch.float64)
            for rank, (x, y) in enumerate(parts):
                logits = model(x, "left" if rank == 0 else "right")
                loss = loss + nn.functional.cross_entropy(logits, y, reduction="sum") / len(X[step])
            loss.backward()
        else:
            backward(model, X[step], Y[step], "left")
        optimizer.step()
    if how == "uneven":
        return  # calls of one pass with parts of the batch: only agreement of the processes counts
    for p, q in zip(model.parameters(), torch.load(folder / how / "weights.pt"), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
