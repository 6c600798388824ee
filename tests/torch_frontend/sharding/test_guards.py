"""What cannot be trained in parts is refused; copies of a model do not drift apart unnoticed."""

import warnings
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=draw)


def backward(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> None:
    x, y = (t.chunk(world)[rank] for t in data(step))
    nn.functional.cross_entropy(model(x), y).backward()


def own_loop(rank: int, world: int, how: str) -> Any:
    """Gradients that are averaged by hand: the weights, and what the optimizer warned of."""
    model = network()
    given = {
        "nothing": {},
        "a group": {"processes": dist.group.WORLD},
        "a mesh": {"processes": init_device_mesh("cpu", (world,))},
    }[how]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SINGD(model, **given)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, rank, world)
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world
            optimizer.step()
    said = [str(w.message) for w in caught if "several processes" in str(w.message)]
    return [p.detach() for p in model.parameters()], said


def alone() -> nn.Module:
    """What one process has trained with the whole batches."""
    model = network()
    optimizer = SINGD(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return model


@pytest.mark.parametrize("how", ["a group", "a mesh"])
def test_processes_that_average_gradients_by_themselves_train_like_one(how: str) -> None:
    found = gloo.run(2, own_loop, how)
    model = alone()
    for weights, said in found:
        assert not said
        for p, q in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=0.0, atol=1e-12)


def test_processes_of_which_nothing_is_told_are_warned_once_what_to_tell() -> None:
    for _, said in gloo.run(2, own_loop, "nothing"):
        (text,) = said
        assert "SINGD(model, processes=torch.distributed.group.WORLD)" in text


def in_parts(rank: int, world: int) -> Any:
    """Parts on one axis of a mesh, and copies of them on the other, by hand.

    The weights where all of the mesh is told; and what is said of less.
    """
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "parts"))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}

    def parted() -> Any:
        return parallelize_module(network(), mesh["parts"], plan)

    def trained(**given: Any) -> SINGD:
        optimizer = SINGD(model, **given)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, mesh["data"].get_local_rank(), 2)
            for p in model.parameters():
                gradient = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                dist.all_reduce(gradient, group=mesh["data"].get_group())
                gradient /= 2
            optimizer.step()
        return optimizer

    model = parted()
    with pytest.raises(ValueError, match="the whole mesh"):
        SINGD(model, processes=mesh["data"])
    with pytest.warns(UserWarning, match="the whole mesh"):
        trained()
    model = parted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(processes=mesh["parts"])  # as if there were no copies
        model = parted()
        optimizer = trained(processes=mesh)
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    fully_shard(model, mesh=mesh["data"])  # and the optimizer has what was there before
    backward(model, 0)
    optimizer.param_groups[0]["T"] = 1
    with pytest.raises(RuntimeError, match="fully_shard"):
        optimizer.step()
    with pytest.raises(TypeError, match="replicate_with_fsdp"):
        SINGD(DistributedDataParallel(parted(), device_mesh=mesh["data"]))
    return [p.detach().clone() for p in found]


@pytest.mark.slow
def test_copies_of_parts_are_told_or_asked_for() -> None:
    model = alone()
    for weights in gloo.run(4, in_parts):
        for p, q in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=0.0, atol=1e-12)


def wrapped_flat(rank: int, world: int, original: bool) -> str:
    model = FullyShardedDataParallel(
        network(), device_id=torch.device("cpu"), use_orig_params=original
    )
    with pytest.raises(TypeError, match="fully_shard") as error:
        SINGD(model)
    return str(error.value)


@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_are_refused(original: bool) -> None:
    gloo.run(1, wrapped_flat, original)


def joined(rank: int, world: int) -> None:
    """The first process has more data than others."""
    wrapped = DistributedDataParallel(network())
    optimizer = SINGD(wrapped, T=1, growing_T=False)

    def run() -> None:
        with wrapped.join():
            for step in range(2 + world - rank):
                optimizer.zero_grad()
                backward(wrapped, step, rank, world)
                optimizer.step()

    with pytest.raises(RuntimeError, match=r"join\(throw_on_early_termination=True\)"):
        run()


@pytest.mark.slow
def test_processes_that_may_stop_before_others_are_refused_at_once() -> None:
    gloo.run(2, joined)


def replace(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Give all modules new parameters."""
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = None if p is None else new[p]
    return new


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)[:, None]
        return self.last(self.attention(x, x, x)[0][:, 0])


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("zero_first", [False, True])
def test_parameters_that_are_switched_go_on_as_those_they_replace(
    after: int, zero_first: bool
) -> None:
    weights = []
    for switches in (False, True):
        torch.manual_seed(0)
        model = Mixed().double()
        optimizer = SINGD(model, T=1, growing_T=False)
        for step in range(STEPS):
            if switches and step == after:
                new = replace(model)
                for group in optimizer.param_groups:
                    group["params"] = [new[p] for p in group["params"]]
            if zero_first:
                optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert "first.weight + bias" in repr(optimizer)
        assert all(p in optimizer.state for p in model.parameters() if p.ndim == 2)
        weights.append([p.detach() for p in model.parameters()])
    for p, q in zip(*weights, strict=True):
        assert torch.equal(p, q)


def test_a_switch_to_other_shapes_is_an_error() -> None:
    model = network()
    optimizer = SINGD(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))] * 6
    with pytest.raises(ValueError, match="build the optimizer again"):
        optimizer.step()


def test_a_model_that_has_other_parameters_by_now_is_an_error() -> None:
    model = network()
    optimizer = SINGD(model)
    replace(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="fully_shard"):
        optimizer.step()


@pytest.mark.parametrize("given", [1, "gloo"])
def test_processes_that_are_no_group_are_an_error(given: Any) -> None:
    with pytest.raises(TypeError, match="ProcessGroup"):
        SINGD(network(), processes=given)


def in_another_order(rank: int, world: int, how: str) -> str:
    """What is said of parameters that come from a set, whose order is another on each process."""
    model = network()
    if how == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        given: dict[str, Any] = {}
    else:
        given = {"processes": dist.group.WORLD, "shard": True}
    params = list(model.parameters())
    try:
        SINGD(model, params[:: -1 if rank else 1], **given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["fully_shard", "shard"])
def test_parameters_in_another_order_on_each_process_are_refused(how: str) -> None:
    text = (
        "the processes have other parameters in one place: '0.weight' (6, 4), '3.bias' (3,). Give "
        "all of them the same parameters in the same order: a set has another order on each, and "
        "what is frozen on one alone is not given there"
    )
    assert gloo.run(2, in_another_order, how) == [text, text]
