"""The networks whose training steps are measured, with one batch of random numbers each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from task_data import CONTEXT, Split
from task_networks import Transformer, VisionTransformer, dense, vgg
from tasks import Loss, symbol_loss
from torch import Tensor, nn

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


def labelled(*shape: int, classes: int) -> Split:
    """Random inputs with random labels."""
    return torch.randn(shape), torch.randint(classes, shape[:1])


def windows(symbols: int = CHARACTERS, batch: int = 16, length: int = CONTEXT) -> Split:
    """Random symbols and successors."""
    x, y = torch.randint(symbols, (2, batch, length))
    return x, y


class Autocast(nn.Module):
    """A network whose products are in bfloat16, and whose outputs are in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            found: Tensor = self.network(x)
        return found.float()


def vit(layers: int, d: int, heads: int, *, batch: int, side: int, classes: int) -> Problem:
    """A vision transformer over patches of 16 × 16 pixels."""

    def model() -> nn.Module:
        sizes = {"channels": 3, "side": side, "patch": 16, "classes": classes}
        return Autocast(VisionTransformer(layers, d, heads, **sizes))

    return Problem(
        title=f"ViT, {layers} layers, d = {d}, {batch} images {side} × {side}, bfloat16 autocast",
        model=model,
        batch=partial(labelled, batch, 3, side, side, classes=classes),
    )


def gpt2(layers: int, d: int, heads: int, *, batch: int, length: int, symbols: int) -> Problem:
    """A GPT-2, which has one matrix for its embedding and its head."""

    def model() -> nn.Module:
        network = Transformer(symbols, layers, d, heads, context=length)
        nn.init.normal_(network.characters.weight, std=0.02)
        network.head.weight = network.characters.weight
        return Autocast(network)

    return Problem(
        title=f"GPT-2, {layers} layers, d = {d}, {batch} × {length} tokens, bfloat16 autocast",
        model=model,
        batch=partial(windows, symbols, batch, length),
        loss=symbol_loss,
        loss_average="batch+sequence",
    )


SMALL = {
    "mlp": Problem(
        title="MLP 784-512-512-10, batch 128",
        model=lambda: nn.Sequential(*dense([784, 512, 512, 10], nn.ReLU)),
        batch=partial(labelled, 128, 784, classes=10),
    ),
    "cnn": Problem(
        title="VGG-like CNN, six convolutions of 32 to 128 channels, images 32 × 32, batch 32",
        model=partial(vgg, [[32, 32], [64, 64], [128, 128]], c_in=3),
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
# For an accelerator; and the same in small, to try the programs that measure them.
LARGE = {
    "vit-s": vit(12, 384, 6, batch=64, side=224, classes=1000),
    "gpt2-small": gpt2(12, 768, 12, batch=8, length=1024, symbols=50257),
}
TINY = {
    "vit-tiny": vit(1, 16, 2, batch=2, side=32, classes=5),
    "gpt2-tiny": gpt2(1, 16, 2, batch=2, length=8, symbols=11),
}
PROBLEMS = SMALL | LARGE | TINY
