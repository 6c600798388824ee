"""The networks whose training steps are measured, with one batch of random numbers each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from task_data import CONTEXT, Split
from task_networks import Transformer, dense
from tasks import Loss, symbol_loss
from torch import nn

CHARACTERS = 65  # of tinyshakespeare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A network and a batch.

    Attributes:
        title: What it is, for the table.
        model: Builds the network.
        batch: Makes the inputs and targets.
        loss: The training loss, a mean.
        loss_average: What the loss is a mean of, as SINGD asks.
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Split]
    loss: Loss = F.cross_entropy
    loss_average: str = "batch"


def vgg() -> nn.Module:
    """Three pairs of 3 × 3 convolutions with pooling behind each, and a linear layer."""
    layers: list[nn.Module] = []
    c_in = 3
    for c_out in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
            c_in = c_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c_in * 4 * 4, 10))


def labelled(*shape: int, classes: int) -> Split:
    """Random inputs with random labels."""
    return torch.randn(shape), torch.randint(classes, shape[:1])


def windows() -> Split:
    """Random characters and successors."""
    x, y = torch.randint(CHARACTERS, (2, 16, CONTEXT))
    return x, y


PROBLEMS = {
    "mlp": Problem(
        title="MLP 784-512-512-10, batch 128",
        model=lambda: nn.Sequential(*dense([784, 512, 512, 10], nn.ReLU)),
        batch=partial(labelled, 128, 784, classes=10),
    ),
    "cnn": Problem(
        title="VGG-like CNN, six convolutions of 32 to 128 channels, images 32 × 32, batch 32",
        model=vgg,
        batch=partial(labelled, 32, 3, 32, 32, classes=10),
    ),
    "gpt": Problem(
        title="GPT, 4 layers, d = 128, 64 tokens, batch 16",
        model=partial(Transformer, CHARACTERS, layers=4, d=128),
        batch=windows,
        loss=symbol_loss,
        loss_average="batch+sequence",
    ),
    "stack": Problem(
        title="48 equal linear layers, d = 64, batch 128",
        model=lambda: nn.Sequential(*dense([64] * 49, nn.Tanh)),
        batch=partial(labelled, 128, 64, classes=64),
    ),
    "wide": Problem(
        title="one linear layer, d = 4096, batch 128",
        model=lambda: nn.Linear(4096, 4096),
        batch=partial(labelled, 128, 4096, classes=4096),
    ),
}
