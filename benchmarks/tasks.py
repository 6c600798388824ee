"""Small training problems: twelve to compare on, others that nothing was chosen on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import task_data as data
import task_networks as networks
import torch
import torch.nn.functional as F
from task_data import Data, Split
from torch import Tensor, nn

Loss = Callable[[Any, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A training problem.

    Attributes:
        title: What it is, for the table.
        data: Gives (inputs, targets) for training and for testing.
        model: Builds the network; torch's global seed decides its start.
        loss: The training loss, a mean over examples.
        metric: What is measured on the test data.
        metric_name: Its name.
        steps: Steps of training.
        batch: Examples in a step.
        loss_average: What the loss is a mean of, as SINGD asks.
        evaluated: Training examples that the final loss is a mean over; None for all.
        needs: A file that has to be there.
    """

    title: str
    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    loss: Loss
    metric: Loss
    metric_name: str
    steps: int
    batch: int = 128
    loss_average: str = "batch"
    evaluated: int | None = None
    needs: Path | None = None

    @property
    def missing(self) -> str | None:
        """What has to be there and is not."""
        return None if self.needs is None or self.needs.exists() else str(self.needs)

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric grows as the model gets better."""
        return self.metric_name == "accuracy"

    def batches(self, seed: int, steps: int) -> Iterator[Split]:
        """Batches without replacement, shuffled anew in each epoch."""
        (x, y), _ = self.data()
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < self.batch:
                order = torch.randperm(len(x), generator=generator)
            chosen, order = order[: self.batch], order[self.batch :]
            yield x[chosen], y[chosen]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """The final training loss and the test metric, with the same noise for every model."""
        model.eval()
        (x, y), (x_test, y_test) = self.data()
        if self.evaluated is not None:
            every = max(len(x) // self.evaluated, 1)
            x, y = x[::every][: self.evaluated], y[::every][: self.evaluated]
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return mean(self.loss, model, x, y), mean(self.metric, model, x_test, y_test)


def mean(function: Loss, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean of a loss or metric over examples."""
    total = 0.0
    for part_x, part_y in zip(x.split(256), y.split(256), strict=True):
        total += float(function(model(part_x), part_y)) * len(part_x)
    return total / len(x)


# ---- losses and metrics -------------------------------------------------------------------------


def symbol_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers."""
    return (logits.argmax(-1) == labels).float().mean()


def squared_error(logits: Tensor, images: Tensor) -> Tensor:
    """The mean squared error of the reconstructed images."""
    return F.mse_loss(logits.sigmoid(), images)


def evidence(outputs: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """The negative lower bound of the evidence: sums over pixels and code, a mean over images."""
    logits, mean, log_variance = outputs
    pixels = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    code = 0.5 * (log_variance.exp() + mean.square() - 1.0 - log_variance).sum()
    return (pixels + code) / len(images)


# ---- the twelve ---------------------------------------------------------------------------------

_classify = functools.partial(Task, loss=F.cross_entropy, metric=accuracy, metric_name="accuracy")
_predict = functools.partial(
    Task,
    loss=symbol_loss,
    metric=symbol_loss,
    metric_name="loss",
    batch=32,
    loss_average="batch+sequence",
    evaluated=data.EVALUATED,
    needs=data.SHAKESPEARE,  # the race makes do with other text
)
_regress = functools.partial(
    Task, loss=F.mse_loss, metric=F.mse_loss, metric_name="squared error", steps=300
)

TWELVE = {
    "digits-mlp": _classify(title="MLP on digits", data=data.digits, model=networks.mlp, steps=150),
    "digits-cnn": _classify(
        title="CNN on digits",
        data=data.digits,
        model=functools.partial(networks.cnn, [16, 32]),
        steps=120,
    ),
    "mnist-cnn": _classify(
        title="CNN on 4000 of MNIST",
        data=data.mnist,
        model=functools.partial(networks.cnn, [8, 16, 32]),
        steps=150,
    ),
    "autoencoder": Task(
        title="autoencoder of MNIST at 14 × 14",
        data=data.small_mnist,
        model=networks.autoencoder,
        loss=F.binary_cross_entropy_with_logits,
        metric=squared_error,
        metric_name="squared error",
        steps=200,
    ),
    "transformer": _predict(
        title="character transformer", data=data.text, model=networks.transformer, steps=150
    ),
    "wide-mlp": _classify(
        title="wide MLP on MNIST", data=data.mnist, model=networks.wide_mlp, steps=100
    ),
    "vit": _classify(
        title="vision transformer on MNIST",
        data=data.mnist,
        model=networks.VisionTransformer,
        steps=200,
        batch=64,
    ),
    "resnet": _classify(
        title="ResNet with batch norm on MNIST at 14 × 14",
        data=data.pooled_mnist,
        model=networks.resnet,
        steps=100,
        batch=64,
    ),
    "vae": Task(
        title="VAE of MNIST at 14 × 14, loss summed over pixels",
        data=data.small_mnist,
        model=networks.VariationalAutoencoder,
        loss=evidence,
        metric=evidence,
        metric_name="loss",
        steps=300,
    ),
    "lstm": _predict(title="character LSTM", data=data.short_text, model=networks.lstm, steps=200),
    "unet": Task(
        title="U-Net that denoises MNIST at 14 × 14",
        data=data.clean_mnist,
        model=networks.UNet,
        loss=F.mse_loss,
        metric=F.mse_loss,
        metric_name="squared error",
        steps=150,
        batch=64,
    ),
    "gcn": _classify(
        title="graph network on Cora",
        data=data.citations,
        model=networks.GraphNetwork,
        steps=100,
        batch=140,
        needs=data.CORA,
    ),
}

# ---- other batches, fewer steps, and tasks that nothing was chosen on ---------------------------


def _resized(name: str, batch: int, steps: int) -> Task:
    task = TWELVE[name]
    title = f"{task.title}, batches of {batch}"
    return dataclasses.replace(task, title=title, batch=batch, steps=steps)


BATCHES = {
    "mnist-cnn-8": _resized("mnist-cnn", 8, 300),
    "wide-mlp-8": _resized("wide-mlp", 8, 200),
    "mnist-cnn-1024": _resized("mnist-cnn", 1024, 40),
    "wide-mlp-1024": _resized("wide-mlp", 1024, 40),
}
SHORT = {
    f"{name}-short": dataclasses.replace(
        task, title=f"{task.title}, {task.steps // 4} steps", steps=task.steps // 4
    )
    for name, task in TWELVE.items()
}
HELD_OUT = {
    "diabetes": _regress(
        title="regression, targets × 100",
        data=data.diabetes,
        model=functools.partial(networks.regression, 10),
    ),
    "sine": _regress(
        title="regression of a sine",
        data=data.sine,
        model=functools.partial(networks.regression, 1),
    ),
    "words": _predict(
        title="word transformer", data=data.words, model=networks.word_model, steps=100, batch=16
    ),
}


def _with_inputs_times(c: float) -> Task:
    task = TWELVE["digits-mlp"]
    scaled = functools.partial(data.inputs_times, c, task.data)
    return dataclasses.replace(task, title=f"{task.title}, inputs × {c:g}", data=scaled)


SCALES = {f"digits-mlp-x{c:g}": _with_inputs_times(c) for c in (0.01, 0.1, 30.0, 1000.0)}
TASKS = TWELVE | BATCHES | SHORT | HELD_OUT | SCALES
