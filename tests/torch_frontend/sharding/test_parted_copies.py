"""Copies of a model on several processes that part the state among them."""

import warnings
from functools import partial
from typing import Any

import gloo
import models
import pytest
import torch
import torch.distributed as dist
from test_fully_shard import STRUCTURES, check, whole
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_localSGD
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD


def copies(rank: int, world: int, name: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """The weights, and how many numbers of state are kept here, and by an optimizer alone."""
    model = DistributedDataParallel(models.new(name))
    optimizer = SINGD(model, shard=True, **models.settings(name, **given))
    models.train(model, optimizer, models.data(name), rank, world)
    state = [t for own in optimizer.state.values() for t in own.values()]
    here = sum(t.numel() for t in state if not t.is_meta)
    return models.weights(model.module), here, sum(t.numel() for t in state)


@pytest.mark.parametrize(
    "case", ["default", "diagonal", pytest.param("toeplitz", marks=pytest.mark.slow)]
)
def test_two_processes_part_the_state_and_train_like_one(case: str) -> None:
    found = gloo.run(2, copies, "tied", STRUCTURES[case])
    check([weights for weights, *_ in found], whole("tied", STRUCTURES[case]))
    for _, here, total in found:
        assert here <= 1.2 * total / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["characters", "images"])
def test_four_processes_part_the_state_and_train_like_one(name: str) -> None:
    found = gloo.run(4, copies, name, {})
    check([weights for weights, *_ in found], whole(name, {}))


def frozen_at_steps(rank: int, world: int, *, frozen: bool) -> Tensor:
    """The weights, of a model that may be frozen while its gradients are averaged by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = SINGD(model, T=1, processes=dist.group.WORLD, shard=True)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().sum(1).mean().backward()
        model.requires_grad_(not frozen)
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
        model.requires_grad_()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.slow
def test_copies_that_are_frozen_at_steps_part_the_state_all_the_same() -> None:
    both = gloo.run(2, partial(frozen_at_steps, frozen=True))
    assert torch.equal(*both)
    assert torch.equal(both[0], gloo.run(2, partial(frozen_at_steps, frozen=False))[0])


def with_dropped_passes(rank: int, world: int, *, by: tuple[int, ...], shard: bool) -> Tensor:
    """The weights, where some processes make a backward pass that they drop before the others'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = SINGD(model.double(), T=1, processes=dist.group.WORLD, shard=shard)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        if rank in by and step > 1:
            model(3.0 * x).square().sum(1).mean().backward()
            model.zero_grad()
        model(x).square().sum(1).mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.slow
def test_a_pass_that_one_process_drops_costs_no_rows_of_the_others() -> None:
    expected, _ = gloo.run(2, partial(with_dropped_passes, by=(), shard=False))
    for by in ((), (0,), (1,), (0, 1)):
        for found in gloo.run(2, partial(with_dropped_passes, by=by, shard=True)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Resting(nn.Module):
    """A process may leave the second branch out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.one(x) + (self.two(x) if both else 0.0)))
        return y


def with_a_spike(rank: int, world: int, *, skipped: bool, shard: bool) -> Tensor:
    """The weights, where all drop a batch, after which one process does not use a layer."""
    inner = Resting().double()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = SINGD(model, T=1, shard=shard)
    generator = torch.Generator().manual_seed(rank)
    for step in range(5):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        inner.zero_grad()
        if skipped and step > 1:
            model(5.0 * x, both=True).square().sum(1).mean().backward()
            inner.zero_grad()
        model(x, both=rank == 1 or step < 2).square().sum(1).mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(inner.parameters()).detach()


@pytest.mark.parametrize("shard", [False, True])
def test_rows_of_a_batch_that_all_drop_do_not_count_where_a_layer_rests(*, shard: bool) -> None:
    expected = gloo.run(2, partial(with_a_spike, skipped=False, shard=shard))
    found = gloo.run(2, partial(with_a_spike, skipped=True, shard=shard))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Partly(nn.Module):
    """With weights that are used in another way only where `alone` is set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.down = nn.Linear(16, 20)
        self.alone = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.table(tokens)))
        y: Tensor = self.down(x)
        if self.alone:
            y = (y + x @ self.up.weight[:, :4].sum(1)[:, None]) * 0.9
            y = y + nn.functional.linear(x, self.table.weight)
        return y


def used(rank: int, world: int) -> dict[str, Tensor]:
    model: Any = models.new("used")
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = SINGD(wrapped, shard=world > 1, **models.settings("used"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no rows of 'blocks.0.mlp.up.weight' are taken")
        models.train(wrapped, optimizer, models.data("used"), rank, world)
    assert "SINGD without rows" in repr(optimizer)
    return models.weights(model)


def test_a_weight_that_is_used_in_another_way_goes_on_without_rows() -> None:
    check(gloo.run(2, used), used(0, 1))


def partly_used(rank: int, world: int, how: str) -> dict[str, Tensor]:
    """The last process alone uses a weight in another way, or alone as a linear map too."""
    model = Partly().double()
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    shard = how == "parted" and world > 1
    optimizer = SINGD(wrapped, shard=shard, **models.settings("tied", T=2, growing_T=False))
    with warnings.catch_warnings(), models.exact_counts():
        warnings.filterwarnings("ignore", "no rows of 'up.weight' are taken")
        for i, (x, y) in enumerate(models.data("tied")):
            optimizer.zero_grad()
            for part in range(2):
                if world == 1 or part == rank:
                    model.alone = part == 1 and i > 0
                    own = models.part_of((x, y), part, 2)
                    (models.loss(wrapped, *own) * (world / 2)).backward()
            optimizer.step()
    assert "SINGD without rows" in repr(optimizer)
    return models.weights(model)


@pytest.mark.parametrize("how", ["whole", "parted"])
def test_a_process_that_alone_uses_weights_in_another_way(how: str) -> None:
    check(gloo.run(2, partly_used, how), partly_used(0, 1, how))


class Branches(nn.Module):
    """Two branches. A batch uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        y: Tensor = self.head((self.left if left else self.right)(x).tanh())
        return y


def branches(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Branches().double(), find_unused_parameters=True)
    optimizer = SINGD(model, shard=True, T=2, growing_T=False)
    for step in range(4):
        optimizer.zero_grad()
        draw = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(8, 4, dtype=torch.float64, generator=draw)
        model(x, rank == 0 or step == 0).square().mean().backward()
        optimizer.step()
    assert "its parts" not in repr(optimizer)
    return [p.detach() for p in model.parameters()]


def test_layers_that_some_processes_do_not_use() -> None:
    first, second = gloo.run(2, branches)
    for p, q in zip(first, second, strict=True):
        assert p.isfinite().all()
        assert (p == q).all()


def with_a_later_refresh(rank: int, world: int, *, shard: bool) -> Tensor:
    """The weights, where a refresh is due no more when its step comes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = SINGD(model, T=1, growing_T=False, processes=dist.group.WORLD, shard=shard)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        model(x).square().sum(1).mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.param_groups[0]["T"] = 50 if step == 2 else 1
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_refresh_that_a_script_puts_off_leaves_copies_equal() -> None:
    results = [gloo.run(2, partial(with_a_later_refresh, shard=shard)) for shard in (False, True)]
    for found in (one for pair in results for one in pair):
        torch.testing.assert_close(found, results[0][0], rtol=1e-12, atol=1e-12)


def by_hand(rank: int, world: int) -> dict[str, Tensor]:
    model = models.new("images")
    given = models.settings("images")
    optimizer = SINGD(model, processes=dist.group.WORLD, shard=True, **given)
    for batch in models.data("images"):
        optimizer.zero_grad()
        models.loss(model, *models.part_of(batch, rank, world)).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world  # type: ignore[operator]
        optimizer.step()
    return models.weights(model)


def test_processes_that_average_gradients_by_themselves() -> None:
    check(gloo.run(2, by_hand), whole("images", {}))


def accumulated(rank: int, world: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(models.new("tied"))
    optimizer = SINGD(model, shard=True, **models.settings("tied"))
    with models.exact_counts():
        for batch in models.data("tied"):
            optimizer.zero_grad()
            first, last = (
                models.part_of(models.part_of(batch, rank, world), i, 2) for i in range(2)
            )
            with model.no_sync():
                (models.loss(model, *first) / 2).backward()
            (models.loss(model, *last) / 2).backward()
            optimizer.step()
    return models.weights(model.module)


@pytest.mark.slow
def test_rows_of_all_passes_that_are_accumulated_count() -> None:
    check(gloo.run(2, accumulated), whole("tied", {}))


def test_nobody_to_share_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="processes="):
        SINGD(models.new("images"), shard=True)


IGNORED = "hidden.weight"


def drifting(rank: int, world: int, how: str) -> str:
    """What is said of gradients that are averaged in no step, or in the first two alone."""
    model = models.new("images")
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [IGNORED])
    wrapped = DistributedDataParallel(model) if how != "own loop" else model
    if how == "local":
        state = post_localSGD.PostLocalSGDState(dist.group.WORLD, alone(rank, world), 2)
        wrapped.register_comm_hook(state, post_localSGD.post_localSGD_hook)
    optimizer = SINGD(wrapped, processes=dist.group.WORLD, shard=True)

    def passes(batch: Any) -> None:
        optimizer.zero_grad()
        models.loss(wrapped, *models.part_of(batch, rank, world)).backward()

    first, *_ = batches = 2 * models.data("images")
    for batch in batches[: 3 if how == "local" else 0]:  # the steps 1, 2 and 4 are looked at
        passes(batch)
        optimizer.step()
    before = models.weights(model)
    passes(first)
    with pytest.raises(RuntimeError, match=r"leave out shard=True") as said:
        optimizer.step()
    for name, p in models.weights(model).items():
        torch.testing.assert_close(p, before[name], rtol=0.0, atol=0.0)
    return str(said.value)


def alone(rank: int, world: int) -> dist.ProcessGroup:
    """The group of this process alone."""
    groups = [dist.new_group([one]) for one in range(world)]
    return groups[rank]


@pytest.mark.parametrize("how", ["own loop", "ignored", "local"])
def test_gradients_that_differ_are_an_error_where_one_process_steps_for_all(how: str) -> None:
    first, second = gloo.run(2, drifting, how)
    assert first == second
    assert (f"gradients of '{IGNORED}', and" in first) == (how == "ignored")
