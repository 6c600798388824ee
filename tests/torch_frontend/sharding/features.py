"""What trainers do beside plain steps: each as several processes do it, and as one does."""

import contextlib
import copy
import math
from typing import Any

import models
import passes
import pytest
import torch
import torch.distributed as dist
from runs import NAME, Run
from test_fully_shard import shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.checkpoint import checkpoint

from singd_torch import SINGD


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
    """Modules keep what was gathered for them, also for an evaluation before a step or a load."""
    run.policy = {"reshard_after_forward": False}
    optimizer = run.build()
    for i, batch in enumerate(models.data(NAME)):
        optimizer.zero_grad()
        run.backward(run.part(batch))
        with torch.set_grad_enabled(i % 2 == 0):
            run.model(batch[0])
        optimizer.step()
        if i == 1:
            with torch.no_grad():
                run.model(batch[0])
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


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


def offloaded(run: Run) -> None:
    run.policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    models.train(run.model, run.build(), models.data(NAME), run.rank, run.world)


def ignored(run: Run) -> None:
    """Some parameters stay whole, whose gradients the loop averages by itself."""
    # A list: processes go over a set of tensors in orders of their own.
    whole = [run.model.head.weight, run.model.norm.bias, run.model.blocks[0].mlp.up.weight]
    run.policy = {"ignored_params": set(whole)}
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        run.backward(run.part(batch))
        for p in whole if run.world > 1 else []:
            dist.all_reduce(p.grad, dist.ReduceOp.SUM)
            p.grad /= run.world
        optimizer.step()


FEATURES = {
    f.__name__: f
    for f in (
        *(passes.accumulated, clipped, not_a_number, frozen, grouped, checkpointed, kept, masked),
        *(compiled, switched, passes.summed, passes.dropped, passes.dropped_and_accumulated),
        *(scaled, unscaled, passes.sampled, offloaded, ignored, passes.unequal, passes.nothing),
        passes.two_losses,
    )
}

# With two copies of two parts.
FOUR = {
    f.__name__: f
    for f in (
        *(passes.accumulated, clipped, not_a_number, frozen, masked, checkpointed, scaled),
        *(passes.nothing, passes.dropped_and_accumulated, passes.all_reduced_late),
    )
}
