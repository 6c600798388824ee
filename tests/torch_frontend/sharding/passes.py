"""Steps of several backward passes, of some that do not count, and of parts that are not equal."""

import models
from runs import NAME, Run
from torch import nn


def accumulated(run: Run) -> None:
    _in_two(run, "set_requires_gradient_sync")


def _in_two(run: Run, tell: str) -> None:
    """Two backward passes a step; a method of the model is told whether it is the last one."""
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        for i in range(2):
            if run.world > 1:
                getattr(run.model, tell)(i == 1)
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
    """The same with several passes. The last alone gives the parts their gradients."""
    optimizer = run.build()
    for batch in models.data(NAME):
        for used in (models.data(NAME)[0], batch):
            run.model.zero_grad()
            for i in range(2):
                if run.world > 1:
                    run.model.set_requires_gradient_sync(i == 1)
                run.backward(models.part_of(run.part(used), i, 2), 0.5)
        optimizer.step()


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


def unequal(run: Run) -> None:
    """The first process has more samples than others."""
    optimizer = run.build()
    for x, y in models.data(NAME):
        optimizer.zero_grad()
        first = len(x) - run.world + 1
        own = slice(None) if run.world == 1 else slice(first + run.rank - 1, first + run.rank)
        own = slice(first) if run.rank == 0 and run.world > 1 else own
        run.backward((x[own], y[own]), len(x[own]) / len(x) * run.world)
        optimizer.step()


def nothing(run: Run) -> None:
    """The last process has no samples in every other step."""
    inside = run.model.blocks
    run.model.blocks = nn.ModuleList(block.mlp for block in inside)  # attention wants samples
    optimizer = run.build()
    for i, (x, y) in enumerate(models.data(NAME)):
        optimizer.zero_grad()
        count = run.world - i % 2 if run.world > 1 else 1
        x_own, y_own = (
            models.part_of((x, y), run.rank, count) if run.rank < count else (x[:0], y[:0])
        )
        logits = run.model(x_own).flatten(0, -2)
        loss = nn.functional.cross_entropy(logits, y_own.flatten(), reduction="sum")
        (loss * run.world / y.numel()).backward()
        optimizer.step()


def two_losses(run: Run) -> None:
    """Of one forward pass."""
    optimizer = run.build()
    for batch in models.data(NAME):
        optimizer.zero_grad()
        x, y = run.part(batch)
        logits = run.model(x).flatten(0, -2)
        nn.functional.cross_entropy(logits, y.flatten()).backward(retain_graph=True)
        (0.1 * logits.square().mean()).backward()
        optimizer.step()


def all_reduced_late(run: Run) -> None:
    """Copies of parts add up their gradients in the last pass alone."""
    _in_two(run, "set_requires_all_reduce")
