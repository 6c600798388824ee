"""Checkpoints of models in parts: any number of processes resumes what any number has saved."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import gloo
import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import cases
from test_fully_shard import check, shard, whole
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from singd_torch import SINGD
from singd_torch.sharding.exchange import Exchange
from singd_torch.sharding.sums import Sums

NAME = "tied"
HALF = models.STEPS // 2


def new(world: int, given: dict[str, Any]) -> tuple[nn.Module, SINGD]:
    model = models.new(NAME)
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    return model, SINGD(model, **models.settings(NAME, **given))


def options(how: str) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=how == "full", flatten_optimizer_state_dict=how == "flat"
    )


def save(rank: int, world: int, folder: str, how: str, before: int, given: Any) -> None:
    """Train for some steps, and save."""
    model, optimizer = new(world, given)
    models.train(model, optimizer, models.data(NAME)[:before], rank, world)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options(how))
    state = {"model": of_model, "optimizer": of_optimizer}
    if how == "full":
        if rank == 0:
            torch.save(state, f"{folder}/state.pt")
    else:
        dcp.save(state, checkpoint_id=folder)


def resume(
    rank: int, world: int, folder: str, how: str, before: int, given: Any
) -> dict[str, Tensor]:
    """Load, and train for the other steps."""
    model, optimizer = new(world, given)
    if how == "full":
        state = torch.load(f"{folder}/state.pt", weights_only=True)
    else:
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options(how))
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options(how),
    )
    models.train(model, optimizer, models.data(NAME)[before:], rank, world)
    return models.weights(model)


def run(world: int, function: Any, *args: Any) -> list[Any]:
    return gloo.run(world, function, *args)


# A change of the number of processes, and a state in parts.
FAST = {(2, 2, ""), (2, 1, "full")}


@pytest.mark.parametrize(
    ("processes", "then", "how"),
    cases(
        [(*numbers, how) for numbers in ((2, 2), (2, 1), (1, 2)) for how in ("", "full", "flat")],
        fast=FAST,
    ),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    processes: int, then: int, how: str, tmp_path: Path
) -> None:
    args = str(tmp_path), how, HALF, {}
    run(processes, save, *args)
    check(run(then, resume, *args), whole(NAME, {}))


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper", "T": 2},
    "diagonal": {"structures": "diagonal", "recipe": "paper", "weight_decay": 0.1},
    "toeplitz": {"structures": ("triltoeplitz", "hierarchical:2,3")},
    "kfac without momentum": {"kfac": True, "momentum": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        # the recipe "paper" resumes in test_parts_go_on_from_a_state_as_it_was_before, too
        c if c == "kfac without momentum" else pytest.param(c, marks=pytest.mark.slow)
        for c in SETTINGS
    ],
)
def test_a_resumed_run_with_other_settings(case: str, tmp_path: Path) -> None:
    args = str(tmp_path), "", HALF, SETTINGS[case]
    run(2, save, *args)
    check(run(2, resume, *args), whole(NAME, SETTINGS[case]))


@pytest.mark.slow
def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    args = str(tmp_path), "", 0, {}
    run(2, save, *args)
    check(run(2, resume, *args), whole(NAME, {}))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "full", "flat"])
@pytest.mark.parametrize("then", [4, 2, 1])
def test_four_processes_save(then: int, how: str, tmp_path: Path) -> None:
    args = str(tmp_path), how, HALF, {}
    run(4, save, *args)
    check(run(then, resume, *args), whole(NAME, {}))


# Where a process dies, and which: the first writes what completes a checkpoint.
POINTS: dict[str, tuple[Any, str, int]] = {
    "writes": (FileSystemWriter, "write_data", -1),
    "completes": (FileSystemWriter, "finish", 0),
    "goes backward": (models, "loss", -1),
    "sends sums": (Sums, "give", 0),
    "sends gradients": (Exchange, "to_owners", -1),
    "has stepped": (Exchange, "to_all", 0),
}


def killed(rank: int, world: int, folder: str, point: str) -> None:
    """Save after each step, until a process dies at the third or while it is saved."""
    model, optimizer = new(world, {})
    place, name, who = POINTS[point]
    call = getattr(place, name)

    def die(*args: Any, **given: Any) -> Any:
        found = call(*args, **given)
        if step == 3 and rank == who % world:
            if name == "loss":
                found.register_hook(lambda _: os._exit(1))
            else:
                os._exit(1)
        return found

    with mock.patch.object(place, name, die):
        for step, batch in enumerate(models.data(NAME), 1):
            models.train(model, optimizer, [batch], rank, world)
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state = {"model": of_model, "optimizer": of_optimizer}
            dcp.save(state, checkpoint_id=f"{folder}/{step}")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_was_killed_goes_on_from_the_last_complete_checkpoint(
    point: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError):
        gloo.run(2, killed, str(tmp_path), point)
    complete = max(int(path.parent.name) for path in tmp_path.glob("*/.metadata"))
    assert complete == (3 if point == "completes" else 2)
    check(run(2, resume, str(tmp_path / str(complete)), "", complete, {}), whole(NAME, {}))


def state(rank: int, world: int) -> tuple[list[tuple[int, str]], int, int]:
    """The keys of a saved state, and how many numbers of state are here, and on one process."""
    model, optimizer = new(world, {})
    models.train(model, optimizer, models.data(NAME), rank, world)
    found = optimizer.state_dict()["state"]
    keys = [(index, name) for index, own in found.items() for name in own]
    tensors = [t for own in found.values() for t in own.values()]
    assert all(isinstance(t, DTensor) for t in tensors if t.ndim)
    here = sum(
        t.numel() for own in optimizer.state.values() for t in own.values() if not t.is_meta
    ) - sum(
        t.numel() - t.to_local().numel()
        for own in optimizer.state.values()
        for t in own.values()
        if isinstance(t, DTensor)
    )
    return keys, here, sum(t.numel() for t in tensors)


def test_each_process_keeps_its_share_of_the_state() -> None:
    found = gloo.run(2, state)
    assert found[0][0] == found[1][0]  # in the same order
    assert sum(here for _, here, _ in found) >= found[0][2]
    for _, here, total in found:
        assert here <= 1.2 * total / 2


def misfit(rank: int, world: int) -> None:
    model, optimizer = new(world, {})
    models.train(model, optimizer, models.data(NAME)[:HALF], rank, world)
    saved = optimizer.state_dict()
    index, name = next(
        (index, name)
        for index, own in saved["state"].items()
        for name in own
        if name.startswith("K.")
    )
    broken = saved["state"] | {index: saved["state"][index] | {name: torch.ones(3)}}
    with pytest.raises(ValueError, match=r"has shape \(3,\) in the checkpoint"):
        optimizer.load_state_dict(saved | {"state": broken})
    again = optimizer.state_dict()["state"]
    for key, own in saved["state"].items():
        assert own.keys() == again[key].keys()
        for name, t in own.items():
            assert torch.equal(
                *(x.to_local() if isinstance(x, DTensor) else x for x in (t, again[key][name]))
            )


def test_a_checkpoint_that_does_not_fit_is_an_error_on_all_processes() -> None:
    gloo.run(2, misfit)


def misfit_compensation(rank: int, world: int) -> None:
    model = torch.nn.Linear(4, 3).bfloat16()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, rounding="kahan")
    model(torch.ones(8, 4).bfloat16()).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for index, own in saved["state"].items():
        cost = own["compensation"]
        assert isinstance(cost, DTensor)
        for wrong, what in ((torch.ones(7), "has shape"), (cost * float("nan"), "is not finite")):
            broken = saved["state"] | {index: own | {"compensation": wrong}}
            with pytest.raises(ValueError, match=f"'compensation' of .* {what}"):
                optimizer.load_state_dict(saved | {"state": broken})


def test_a_compensation_that_does_not_fit_is_an_error_on_all_processes() -> None:
    gloo.run(2, misfit_compensation)


def misfit_moment(rank: int, world: int) -> None:
    """AdamW trains the layer, as its rows are never seen, and one process has its state."""
    model = torch.nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SINGD(model, recipe="paper")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    index, own = next((i, own) for i, own in saved["state"].items() if "exp_avg" in own)
    nan = own["exp_avg_sq"] * float("nan")
    missing = {name: t for name, t in own.items() if name != "exp_avg_sq"}
    for wrong, what in ((own | {"exp_avg_sq": nan}, "is not finite"), (missing, "no 'exp_avg_sq'")):
        with pytest.raises(ValueError, match=what):
            optimizer.load_state_dict(saved | {"state": saved["state"] | {index: wrong}})
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.skipped == 0


def test_a_moment_of_a_layer_without_rows_that_does_not_fit_is_an_error() -> None:
    gloo.run(2, misfit_moment)
