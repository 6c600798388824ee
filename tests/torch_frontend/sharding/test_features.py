"""What trainers do beside plain steps, with a model in parts: equal to one process that does it."""

import warnings
from typing import Any

import gloo
import models
import pytest
import torch
from features import FEATURES, FOUR
from runs import NAME, Run
from test_fully_shard import check
from test_meshes import parted
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from singd_torch import SINGD


def worker(rank: int, world: int, name: str) -> dict[str, Tensor]:
    run = Run(rank, world)
    with models.exact_counts():
        (FEATURES | FOUR)[name](run)
    return models.weights(run.model)


SLOW = {"compiled", "kept", "sampled", "offloaded", "ignored", "unequal", "nothing", "two_losses"}
SLOW |= {"dropped", "unscaled"}  # nearly as "dropped_and_accumulated" and "scaled"
SLOW |= {"switched", "frozen", "not_a_number", "checkpointed"}  # of one process in other tests


@pytest.mark.parametrize(
    "name",
    [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FEATURES],
)
def test_two_processes_do_as_one(name: str) -> None:
    found = gloo.run(2, worker, name)
    check(found, worker(0, 1, "kept" if name == "compiled" else name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_two_copies_of_two_parts_do_as_one(name: str) -> None:
    check(gloo.run(4, worker, name), worker(0, 1, name))


def cast(rank: int, world: int) -> dict[str, Tensor]:
    """Training under autocast."""
    run = Run(rank, world)
    run.model.float()
    optimizer = run.build()
    with models.exact_counts():
        for batch in models.data(NAME):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = models.loss(run.model, *run.part(batch))
            loss.backward()
            optimizer.step()
    return models.weights(run.model)


@pytest.mark.slow
def test_autocast_differs_by_the_rounding_of_sums() -> None:
    wanted = cast(0, 1)
    for found in gloo.run(2, cast):
        for name, p in wanted.items():
            assert found[name].dtype == torch.float32
            # sums over samples are rounded to 8 bits before they are added up, as in `half`
            assert (found[name] - p).abs().max() < 0.01, name


def half(rank: int, world: int) -> tuple[dict[str, Tensor], set[torch.dtype], list[str]]:
    run = Run(rank, world)
    run.model.float()
    run.policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models.train(run.model, run.build(), models.data(NAME), rank, world)
    state = run.optimizer._stepper.sharded.share.state  # type: ignore[union-attr]
    dtypes = {t.dtype for own in state.values() for t in own.values()}
    return models.weights(run.model), dtypes, [str(w.message) for w in caught]


def test_a_policy_of_bfloat16_leaves_state_and_weights_in_float32() -> None:
    (first, dtypes, _), (second, *_) = gloo.run(2, half)
    assert dtypes == {torch.float32}
    model = models.new(NAME).float()
    models.train(model, SINGD(model, **models.settings(NAME)), models.data(NAME))
    for name, p in model.named_parameters():
        assert torch.equal(first[name], second[name])
        assert first[name].dtype == torch.float32
        # rows and gradients have 8 bits: four steps of at most 0.12 × 1.5 each, a hundredth off
        assert (first[name] - p).abs().max() < 0.02, name


GIVEN: dict[str, dict[str, Any]] = {
    "owned": {},
    "local": {"structures": ("diagonal", "diagonal")},
}


def diagnosed(rank: int, world: int, name: str, given: dict[str, Any]) -> dict[str, float]:
    """What is told of the last of some steps."""
    model, index, of = parted(name, "parts", world) if world > 1 else (models.new(name), 0, 1)
    optimizer = SINGD(model, **models.settings(name, T=1, growing_T=False, **given))
    optimizer.diagnostics()
    models.train(model, optimizer, models.data(name), index, of)
    return optimizer.diagnostics()


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("images", "owned"),
        pytest.param("characters", "local", marks=pytest.mark.slow),
        pytest.param("convolutions", "owned", marks=pytest.mark.slow),  # a convolution rests
    ],
)
def test_processes_tell_of_the_layers_that_they_step(name: str, case: str) -> None:
    wanted = diagnosed(0, 1, name, GIVEN[case])
    found = gloo.run(2, diagnosed, name, GIVEN[case])
    assert found[0].keys() | found[1].keys() == wanted.keys()
    for own in found:
        assert own
        for key, value in own.items():
            assert value == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key
