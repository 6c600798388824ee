"""What is found out of layers, in checkpoints of models that several processes step together."""

import copy
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from cases import cases
from test_fully_shard import shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from watched import Product

from singd_torch import SINGD

pytestmark = pytest.mark.filterwarnings("ignore:no rows of")
STEPS = 12


class _Last(nn.Linear):
    """A layer that also uses its weight where nobody sees it, from some step on."""

    late = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 3.0 * Product.apply(x.flip(0), self.weight) if self.late else y


def _begin(how: str, world: int) -> tuple[nn.Sequential, SINGD]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), _Last(4, 3))
    if how == "parts":
        shard(model, init_device_mesh("cpu", (world,)))
        return model, SINGD(model)
    return model, SINGD(model, processes=dist.group.WORLD, shard=True)


def _train(model: Any, optimizer: SINGD, steps: range, how: str, rank: int) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        torch.manual_seed(100 * step + rank)
        x = torch.randn(8, 5)
        model[2].late = how == "parts" and step > 2
        if how == "copies" and step > 2:  # no call of the layer is seen any more
            weight, bias = (p.detach().clone().requires_grad_() for p in model[2].parameters())
            y = model[:2](x) @ weight.mT + bias
        else:
            y = model(x)
        (y - 1.0).square().mean().backward()
        if how == "copies":
            if step > 2:
                model[2].weight.grad, model[2].bias.grad = weight.grad, bias.grad
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def _resumed(
    rank: int, world: int, how: str, flat: bool, at: int, fresh: bool, back: int = 0
) -> float:
    """How far a run that goes on at a step is from one without an interruption.

    The optimizer has taken `back` more steps, which are taken back.
    """
    expected = _train(*_begin(how, world), range(STEPS), how, rank)
    model, optimizer = _begin(how, world)
    _train(model, optimizer, range(at), how, rank)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if how == "copies":
        saved: Any = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    else:
        saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    _train(model, optimizer, range(at, at + back), how, rank)
    if fresh:
        model, optimizer = _begin(how, world)
    if how == "copies":
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    else:
        of_model, of_optimizer = saved
        given = {"model_state_dict": of_model, "optim_state_dict": of_optimizer}
        set_state_dict(model, optimizer, **given, options=options)
    found = _train(model, optimizer, range(at, STEPS), how, rank)
    gaps = [float((p - q).abs().max()) for p, q in zip(found, expected, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("at", cases([2, 5, 6], fast=[5]))
def test_missed_refreshes_count_on_where_the_state_is_parted(at: int) -> None:
    assert gloo.run(2, _resumed, "copies", False, at, True) == [0.0, 0.0]


@pytest.mark.parametrize("flat", cases([False, True], fast=[True]), ids=["nested", "flat"])
def test_a_layer_that_has_lost_its_rows_keeps_its_state(flat: bool) -> None:
    """A checkpoint goes back into the optimizer that it is of."""
    assert gloo.run(2, _resumed, "parts", flat, 8, False) == [0.0, 0.0]


@pytest.mark.parametrize("flat", cases([False, True], fast=[False]), ids=["nested", "flat"])
@pytest.mark.parametrize("at", cases([1, 3, 5], fast=[3]))
def test_steps_are_taken_back_in_which_a_layer_lost_its_rows(at: int, flat: bool) -> None:
    assert gloo.run(2, _resumed, "parts", flat, at, False, 8) == [0.0, 0.0]
