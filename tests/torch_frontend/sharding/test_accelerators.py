"""Processes with an accelerator each take the steps of those with a CPU: here they pretend to."""

import itertools
import warnings
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch
from cases import cases
from test_fully_shard import check, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from watched import Products

from singd_torch import SINGD
from singd_torch.layers import layer
from singd_torch.step import bundle_step
from singd_torch.tensors import pieces

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "toeplitz": {"structures": ("triltoeplitz", "hierarchical:2,3")},
    "no momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "paper": {"recipe": "paper", "T": 2},
    "kfac": {"kfac": True},
}


def trained(model: Any, wrapped: Any, rank: int, world: int, given: Any) -> Any:
    """The weights, how many steps were skipped, and how many bundles were stepped."""
    name = "characters"
    if wrapped != "copies":
        optimizer = SINGD(model, **models.settings(name, **given))
        inside = model
    else:
        inside, model = model, DistributedDataParallel(model)
        optimizer = SINGD(model, shard=True, **models.settings(name, **given))
    advance = bundle_step.advance
    with mock.patch.object(bundle_step, "advance", side_effect=advance) as advanced:
        models.train(model, optimizer, models.data(name), rank, world)
    return models.weights(inside), optimizer.skipped, advanced.call_count


def on_accelerators(rank: int, world: int, how: str, given: Any) -> Any:
    model = models.new("characters")
    if how == "parts":
        shard(model, init_device_mesh("cpu", (world,)))
    with mock.patch.object(pieces, "on_host", return_value=False):
        return trained(model, how, rank, world, given)


# Each kind of factors and each rule once; all settings are in test_fully_shard.py, too.
FAST = {
    ("parts", "default"),
    ("parts", "kfac"),
    ("copies", "diagonal"),
    ("copies", "paper"),
}


@pytest.mark.parametrize(
    ("how", "case"),
    cases(itertools.product(["parts", "copies"], CASES), fast=FAST),
)
def test_two_processes_step_bundles_as_one_steps_layers(how: str, case: str) -> None:
    # AdamW has powers of its betas in float32 there
    given = CASES[case] | {"fallback_lr": 0.0}
    wanted, *_ = trained(models.new("characters"), "", 0, 1, given)
    found = gloo.run(2, on_accelerators, how, given)
    check([weights for weights, *_ in found], wanted)
    for _, skipped, bundles in found:
        assert skipped == 0
        in_parts = (how, case) == ("parts", "diagonal")  # all layers, see test_local.py
        assert bool(bundles) == (case not in ("coupled decay", "paper", "kfac") and not in_parts)


def disturbed(rank: int, world: int) -> dict[str, Tensor]:
    """Steps: one has a row that is not finite, on the last process, and one is frozen."""
    model: Any = models.new("characters")
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, **models.settings("characters", fallback_lr=0.0))

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (float("nan") if rank == world - 1 else 1.0)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradients? of .* changed nothing")
        for i, batch in enumerate(models.data("characters", 6)):
            hook = model.norm.register_forward_hook(poison) if i == 2 else None
            model.blocks[0].mlp.up.weight.requires_grad_(i != 4)
            models.train(model, optimizer, [batch], rank, world)
            if hook is not None:
                hook.remove()
        assert optimizer.skipped == 1
    return models.weights(model)


def disturbed_on_accelerators(rank: int, world: int) -> dict[str, Tensor]:
    with mock.patch.object(pieces, "on_host", return_value=False):
        return disturbed(rank, world)


def test_a_row_that_is_not_finite_stops_all_and_a_frozen_weight_stays() -> None:
    check(gloo.run(2, disturbed_on_accelerators), disturbed(0, 1))


def half(rank: int, world: int) -> list[tuple[Any, Any]]:
    """The dtypes of products in backward passes and in steps. Every other step refreshes."""
    model: Any = models.new("characters").float()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    shard(model, init_device_mesh("cpu", (world,)), mp_policy=policy)
    found = []
    with (
        mock.patch.object(pieces, "on_host", return_value=False),
        mock.patch.object(layer, "on_host", return_value=False),
    ):
        optimizer = SINGD(model, **models.settings("characters", T=2, growing_T=False))
        for batch in models.data("characters"):
            optimizer.zero_grad()
            loss = models.loss(model, *models.part_of(batch, rank, world))
            with Products() as early:
                loss.backward()
            with Products() as now:
                optimizer.step()
            found.append((early.dtypes, now.dtypes))
    return found


@pytest.mark.slow
def test_products_are_in_bfloat16_where_those_of_the_model_are() -> None:
    for found in gloo.run(2, half):
        for early, now in found:
            assert early[torch.bfloat16] > 0
            assert early[torch.float32] == 0  # rows are multiplied as they are
            assert now[torch.bfloat16] > 0  # gradients with factors
