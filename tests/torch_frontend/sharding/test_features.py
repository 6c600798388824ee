"""What trainers do beside plain steps, with a model in parts: equal to one process that does it."""

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import gloo
import models
import pytest
import torch
from test_fully_shard import check, shard
from test_meshes import parted
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from singd_torch import SINGD

NAME = "characters"


class Run:
    """A model, in parts unless it is that of one process, its optimizer and this process's data."""

    def __init__(self, rank: int, world: int, before: Callable[[Any], None] | None = None) -> None:
        self.rank, self.world = rank, world
        self.model: Any = models.new(NAME)
        if before is not None:
            before(self.model)
        self.given: dict[str, Any] = {}
        self.policy: dict[str, Any] = {}

    def build(self, **given: Any) -> SINGD:
        if self.world > 1:
            mesh = init_device_mesh("cpu", (self.world,))
            shard(self.model, mesh, **self.policy)
        self.optimizer = SINGD(self.model, **models.settings(NAME, **given))
        return self.optimizer

    def part(self, batch: models.Data) -> models.Data:
        return models.part_of(batch, self.rank, self.world)

    def backward(self, batch: models.Data, share: float = 1.0) -> None:
        (models.loss(self.model, *batch) * share).backward()


def accumulated(run: Run) -> None:
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        for i in range(2):
            if run.world > 1:
                run.model.set_requires_gradient_sync(i == 1)
            run.backward(models.part_of(run.part(batch), i, 2), 0.5)
        optimizer.step()


def dropped(run: Run) -> None:
    """Passes whose gradients the model forgets, and with them their rows; one of them is whole."""
    optimizer = run.build()
    for i, batch in enumerate(models.data(NAME)):
        for _ in range(i):
            run.backward(run.part(models.data(NAME)[0]))
            run.model.zero_grad()
        run.backward(models.part_of(run.part(batch), 0, 2), 0.5)
        run.backward(models.part_of(run.part(batch), 1, 2), 0.5)
        optimizer.step()
        run.model.zero_grad()


def dropped_and_accumulated(run: Run) -> None:
    """The same, of passes of which the last alone gives the parts their gradients."""
    optimizer = run.build()
    for batch in models.data(NAME):
        for used in (models.data(NAME)[0], batch):
            run.model.zero_grad()
            for i in range(2):
                if run.world > 1:
                    run.model.set_requires_gradient_sync(i == 1)
                run.backward(models.part_of(run.part(used), i, 2), 0.5)
        optimizer.step()


def clipped(run: Run) -> None:
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        run.backward(run.part(batch))
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()


def not_a_number(run: Run) -> None:
    """The last process alone has a row that is not finite, in a step with a refresh."""
    optimizer, last = run.build(), run.rank == run.world - 1

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (float("nan") if last else 1.0)

    warned = pytest.warns(UserWarning, match="changed nothing")
    for i, batch in enumerate(models.data(NAME)):
        optimizer.zero_grad()
        hook = run.model.norm.register_forward_hook(poison) if i == 2 else None
        run.backward(run.part(batch))
        if hook is not None:
            hook.remove()
        with warned if i == 2 else contextlib.nullcontext():
            optimizer.step()
    assert optimizer.skipped == 1


def scaled(run: Run, *, unscaled: bool = False) -> None:
    """With a scaler, whose scale grows, and whose loss is infinite once on the last process."""
    optimizer, last = run.build(), run.rank == run.world - 1
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    warned = pytest.warns(UserWarning, match="changed nothing")
    for i, batch in enumerate(models.data(NAME, 3)):
        optimizer.zero_grad()
        loss = models.loss(run.model, *run.part(batch))
        scaler.scale(loss * (math.inf if i == 1 and last else 1.0)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        with warned if i == 1 else contextlib.nullcontext():
            scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped == 1
    assert scaler.get_scale() == 2.0**11  # doubled, halved and doubled


def unscaled(run: Run) -> None:
    scaled(run, unscaled=True)


def frozen(run: Run) -> None:
    run.model.blocks[0].attention.q.weight.requires_grad_(False)
    run.model.blocks[0].mlp.up.bias.requires_grad_(False)
    run.model.norm.weight.requires_grad_(False)
    optimizer = run.build()
    models.train(run.model, optimizer, models.data(NAME, 2), run.rank, run.world)
    run.model.blocks[1].mlp.down.weight.requires_grad_(False)  # later, but its bias is trained
    models.train(run.model, optimizer, models.data(NAME, 2), run.rank, run.world)


def grouped(run: Run) -> None:
    """Groups with settings of their own, a schedule, a closure, and a group that joins later."""
    if run.world > 1:
        shard(run.model, init_device_mesh("cpu", (run.world,)))
    head = run.model.head.weight
    biases = [p for name, p in run.model.named_parameters() if "bias" in name]
    kept = {*biases, head}
    groups = [
        {"params": [p for p in run.model.parameters() if p not in kept], "weight_decay": 0.2},
        {"params": biases, "lr": 0.03},
    ]
    optimizer = SINGD(run.model, groups, **models.settings(NAME))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    with models.exact_counts():
        for i, batch in enumerate(models.data(NAME)):
            if i == 2:
                with torch.no_grad():
                    run.model(batch[0])  # modules have what was gathered for it
                if run.world > 1:
                    with pytest.raises(ValueError, match="reshard"):
                        SINGD(run.model, [run.model.head.weight])
                optimizer.add_param_group({"params": [head], "T": 1})

            def closure(batch: models.Data = batch) -> float:
                run.model.zero_grad()
                loss = models.loss(run.model, *run.part(batch))
                loss.backward()
                return loss.item()

            assert optimizer.step(closure) > 0.0
            schedule.step()


def checkpointed(run: Run) -> None:
    for block in run.model.blocks:
        forward = block.mlp.forward
        block.mlp.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    models.train(run.model, run.build(), models.data(NAME), run.rank, run.world)


def kept(run: Run) -> None:
    run.policy = {"reshard_after_forward": False}
    models.train(run.model, run.build(), models.data(NAME), run.rank, run.world)


def masked(run: Run) -> None:
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        x, y = run.part(batch)
        mask = torch.arange(6) < 5
        optimizer.mask_rows(mask.expand(x.shape))
        run.backward((x, torch.where(mask, y, -100)))
        optimizer.step()


def compiled(run: Run) -> None:
    for block in run.model.blocks:
        block.compile(backend="aot_eager")
    models.train(run.model, run.build(), models.data(NAME), run.rank, run.world)


def switched(run: Run) -> None:
    """The optimizer is built first, and then given the parts, as Accelerate does."""
    optimizer = SINGD(run.model, **models.settings(NAME))
    if run.world > 1:
        old = list(run.model.parameters())
        shard(run.model, init_device_mesh("cpu", (run.world,)))
        new = dict(zip(old, run.model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [new[p] for p in group["params"]]
    with models.exact_counts():
        for batch in models.data(NAME):
            run.backward(run.part(batch))
            optimizer.step()
            optimizer.zero_grad()


def summed(run: Run) -> None:
    """Losses that are divided by what all processes have, whose gradients are added up."""
    optimizer = run.build(gradients="sum")
    if run.world > 1:
        run.model.set_gradient_divide_factor(1.0)
        for block in run.model.blocks:
            block.set_gradient_divide_factor(1.0)
    for batch in models.data(NAME):
        optimizer.zero_grad()
        run.backward(run.part(batch), 1 / run.world)
        optimizer.step()


def sampled(run: Run) -> None:
    """Rows from other labels than gradients, of one forward pass, and after a pass that adds up."""
    optimizer = run.build(T=1)
    for batch in models.data(NAME):
        optimizer.zero_grad()
        for i in range(2):
            x, y = models.part_of(run.part(batch), i, 2)
            logits = run.model(x).flatten(0, -2)
            with optimizer.sampled_labels():
                other = nn.functional.cross_entropy(logits, (7 * y.flatten()) % 20)
                (other / 2).backward(retain_graph=True)
            (nn.functional.cross_entropy(logits, y.flatten()) / 2).backward()
        optimizer.step()


FEATURES = {
    f.__name__: f
    for f in (
        *(accumulated, clipped, not_a_number, frozen, grouped, checkpointed, kept, masked),
        *(compiled, switched, summed, dropped, dropped_and_accumulated, scaled, unscaled, sampled),
    )
}


def worker(rank: int, world: int, name: str) -> dict[str, Tensor]:
    run = Run(rank, world)
    with models.exact_counts():
        FEATURES[name](run)
    return models.weights(run.model)


SLOW = ("compiled", "sampled")


@pytest.mark.parametrize(
    "name",
    [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FEATURES],
)
def test_two_processes_do_as_one(name: str) -> None:
    found = gloo.run(2, worker, name)
    check(found, worker(0, 1, "kept" if name == "compiled" else name))


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
        pytest.param("convolutions", "owned", marks=pytest.mark.slow),  # one of which rests
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
