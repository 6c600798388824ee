"""Weights that fully_shard gathers, used without calls of their modules, and passes of no loss."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gloo
import models
import pytest
import torch
import torch.nn.functional as F
from test_fully_shard import check, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from singd_torch import SINGD

GIVEN: dict[str, Any] = {"T": 1, "growing_T": False}


class Bent(nn.Linear):
    """A subclass. The gradient of its output gives no rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight, self.bias))


def as_linear_map(model: Any, x: Tensor) -> Tensor:
    return F.linear(x, model.table.weight)


def transposed(model: Any, x: Tensor) -> Tensor:
    return x @ model.table.weight.T


def twice(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.head(x) + F.linear(x.sin(), weight=model.head.weight)
    return y


def subclassed(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.head(model.bent(x))
    return y


def averaged(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.head(x) * (1.0 + model.head.weight.mean())
    return y


def hidden(model: Any, x: Tensor) -> Tensor:
    """As in compiled code, where no call is seen."""
    with torch._C.DisableTorchFunction():
        other = F.linear(x.sin(), model.head.weight)
    y: Tensor = model.head(x) + other
    return y


# What a model does at its end, and why a weight then has no rows.
USES: dict[Callable[..., Tensor], str] = {
    as_linear_map: "",
    transposed: "",
    twice: "",
    subclassed: "",
    averaged: "used by torch.Tensor.mean",
    hidden: "used where no call is seen",
}


class Model(models.Characters):
    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__()
        self.bent, self.end = Bent(16, 16), end

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.end(self, self.norm(x))


def trained(
    rank: int, world: int, ends: Sequence[Callable[..., Tensor]], later: bool = False
) -> Any:
    """For each way to end, the weights, and the table of the optimizer.

    Weights may be parted `later`, when there is an optimizer, as by Accelerate.
    """
    found = []
    for end in ends:
        torch.manual_seed(0)
        model: Any = Model(end).double()
        old = list(model.parameters())
        built = SINGD(model, **models.settings("characters", **GIVEN)) if later else None
        if world > 1:
            shard(model, init_device_mesh("cpu", (world,)))
        optimizer = built or SINGD(model, **models.settings("characters", **GIVEN))
        new = dict(zip(old, model.parameters(), strict=True))
        for group in optimizer.param_groups if later else ():
            group["params"] = [new[p] for p in group["params"]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no rows of 'head.weight' are taken")
            models.train(model, optimizer, models.data("characters", 3), rank, world)
        found.append((models.weights(model), repr(optimizer)))
    return found


def check_uses(ends: Sequence[Callable[..., Tensor]], later: bool = False) -> None:
    wanted = trained(0, 1, ends)
    for found in gloo.run(2, trained, ends, later):
        for end, (weights, table), (expected, of_one) in zip(ends, found, wanted, strict=True):
            check([weights], expected)
            for text in (table, of_one):
                (line,) = (line for line in text.splitlines() if line.startswith("head.weight "))
                assert ("without rows" in line) == bool(USES[end])
                assert USES[end] in line


def test_uses_without_their_modules_are_seen_or_said() -> None:
    check_uses([as_linear_map, hidden])


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
def test_all_uses_without_their_modules_are_seen_or_said(later: bool) -> None:
    check_uses(list(USES), later)


def perturbed(rank: int, world: int) -> dict[str, Tensor]:
    """Training with inputs that a derivative with respect to them has moved."""
    name = "convolutions"
    model = models.new(name)
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, **models.settings(name, **GIVEN))
    for batch in models.data(name):
        optimizer.zero_grad()
        x, y = models.part_of(batch, rank, world)
        x.requires_grad_()
        (g,) = torch.autograd.grad(models.loss(model, x, y), x)
        models.loss(model, x.detach() + 0.1 * g.sign(), y).backward()
        optimizer.step()
    return models.weights(model)


@pytest.mark.slow
def test_derivatives_with_respect_to_inputs_bring_no_rows() -> None:
    check(gloo.run(2, perturbed), perturbed(0, 1))
