"""Tasks of `many.py` on the digits of scikit-learn."""

from __future__ import annotations

import functools
import itertools
import statistics

import torch
import torch.nn.functional as F
from many_tasks_common import Task, all_digits, at_end, fitted, fixed, history, some_digits
from noisy import Build, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations

relu = functools.partial(network, activation=nn.ReLU)

# ---- classifiers --------------------------------------------------------------------------------


def classified(build: Build, steps: int, model: nn.Module, batch: int = 64) -> float:
    """Train a classifier of the 64 numbers."""

    def loss() -> Tensor:
        x, y = some_digits(batch)
        return F.cross_entropy(model(x), y)

    return fitted(build, model, steps, loss)


def wholly(build: Build, steps: int, model: nn.Module, batch: int = 64) -> float:
    """The same, and the loss over all training images at the end."""
    classified(build, steps, model, batch)
    x, y = all_digits()
    return at_end(model, lambda: F.cross_entropy(model(x), y))


def few(batch: int, build: Build, steps: int) -> float:
    """Batches of few examples."""
    return wholly(build, steps, relu(64, 64, 32, 10), batch)


def spectral(build: Build, steps: int) -> float:
    """Weights whose largest singular value is 1, by torch's parametrization."""
    model = relu(64, 64, 64, 10)
    for layer in model[::2]:
        parametrizations.spectral_norm(layer)
    return classified(build, steps, model)


def weight_norm(build: Build, steps: int) -> float:
    """Weights that are a direction and a length, by torch's parametrization."""
    model = relu(64, 64, 64, 10)
    for layer in model[::2]:
        parametrizations.weight_norm(layer)
    return classified(build, steps, model)


def wrong_labels(build: Build, steps: int) -> float:
    """Three labels in ten are drawn anew: the loss of test images with their right labels."""
    model, (x, y) = relu(64, 64, 32, 10), all_digits()
    drawn = torch.randint(10, y.shape, generator=fixed())
    given = torch.where(torch.rand(y.shape, generator=fixed(1)) < 0.3, drawn, y)

    def loss() -> Tensor:
        rows = torch.randint(len(x), (64,))
        return F.cross_entropy(model(x[rows]), given[rows])

    fitted(build, model, steps, loss)
    x_test, y_test = all_digits(test=True)
    return at_end(model, lambda: F.cross_entropy(model(x_test), y_test))


def logistic(build: Build, steps: int) -> float:
    """One linear layer."""
    return wholly(build, steps, nn.Linear(64, 10))


def summed(build: Build, steps: int) -> float:
    """The loss is a sum over the batch; the number is its mean."""
    model = relu(64, 64, 32, 10)

    def loss() -> Tensor:
        x, y = some_digits(64)
        return F.cross_entropy(model(x), y, reduction="sum")

    return fitted(build, model, steps, loss) / 64.0


def dropout(build: Build, steps: int) -> float:
    """A convolutional network with dropout."""
    conv = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
    rest = nn.Dropout(0.5), nn.Linear(32 * 4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)
    shape = nn.Unflatten(1, (1, 8, 8))
    model = nn.Sequential(shape, *conv, nn.MaxPool2d(4), nn.Dropout2d(0.25), nn.Flatten(), *rest)
    return classified(build, steps, model, 32)


class Block(nn.Module):
    """Two convolutions with group norm, and a way around them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        pair = (nn.GroupNorm(4, c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False))
        again = (nn.GroupNorm(4, c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False))
        self.inner = nn.Sequential(*pair, *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def group_norm(build: Build, steps: int) -> float:
    """A residual network with group norm."""
    first = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1)
    last = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    model = nn.Sequential(*first, Block(16), nn.MaxPool2d(2), Block(16), *last)
    return classified(build, steps, model, 32)


class Experts(nn.Module):
    """The mean of six experts, weighted by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = (
            nn.Linear(64, 6),
            nn.ModuleList(relu(64, 16, 10) for _ in range(6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(1)[..., None] * found).sum(1)


class Tied(nn.Module):
    """One layer that is applied twelve times, as a model with a fixed point is."""

    def __init__(self, d: int = 48) -> None:
        super().__init__()
        self.inward, self.again, self.head = nn.Linear(64, d), nn.Linear(d, d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        given = self.inward(x)
        z = torch.zeros_like(given)
        for _ in range(12):
            z = (given + self.again(z)).tanh()
        return self.head(z)


def changing(build: Build, steps: int) -> float:
    """Pixels are shuffled anew after each quarter: the mean loss of all steps."""
    model, count, parts = relu(64, 64, 32, 10), itertools.count(), fixed()
    orders = [torch.randperm(64, generator=parts) for _ in range(4)]

    def loss() -> Tensor:
        x, y = some_digits(32)
        return F.cross_entropy(model(x[:, orders[4 * next(count) // steps]]), y)

    return statistics.fmean(history(build, model, steps, loss))


# ---- other aims ---------------------------------------------------------------------------------


def two_heads(build: Build, steps: int) -> float:
    """One body with two heads, for the label and for the right half of the image."""
    body, label, half = relu(32, 64, 64), nn.Linear(64, 10), nn.Linear(64, 32)
    model = nn.ModuleDict({"body": body, "label": label, "rest": half})

    def loss() -> Tensor:
        x, y = some_digits(64)
        left, right = x.view(-1, 8, 2, 4).unbind(2)
        inner = body(left.flatten(1)).relu()
        return F.cross_entropy(label(inner), y) + 10.0 * F.mse_loss(half(inner), right.flatten(1))

    return fitted(build, model, steps, loss)


def changed(x: Tensor) -> Tensor:
    """Images that are moved, covered in part and made noisy."""
    across, down = torch.randint(-1, 2, (2,)).tolist()
    x = x.view(-1, 8, 8).roll((across, down), (1, 2)).flatten(1)
    return x * (torch.rand_like(x) > 0.2) + 0.1 * torch.randn_like(x)


def contrastive(build: Build, steps: int) -> float:
    """InfoNCE: to find the other view of the same image among 64."""
    model = relu(64, 128, 32)

    def loss() -> Tensor:
        x, _ = some_digits(64)
        one, other = (F.normalize(model(changed(x)), dim=1) for _ in range(2))
        return F.cross_entropy(5.0 * one @ other.T, torch.arange(64))

    return fitted(build, model, steps, loss)


def sigmoids(build: Build, steps: int) -> float:
    """An autoencoder whose hidden layers are all sigmoids."""
    model = network(64, 48, 8, 48, 64, activation=nn.Sigmoid)

    def loss() -> Tensor:
        x, _ = some_digits(64)
        return F.binary_cross_entropy_with_logits(model(x), x)

    return fitted(build, model, steps, loss)


def codebook(build: Build, steps: int) -> float:
    """A VQ-VAE (van den Oord et al., arXiv 1711.00937): its squared error at the end."""
    encoder, decoder, codes = relu(64, 64, 32), relu(32, 64, 64), nn.Embedding(32, 8)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder, "codes": codes})
    nn.init.uniform_(codes.weight, -1.0 / 32, 1.0 / 32)

    def found(x: Tensor) -> tuple[Tensor, Tensor]:
        z = encoder(x).view(-1, 8)
        code = codes(torch.cdist(z.detach(), codes.weight.detach()).argmin(1))
        near = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return decoder((z + (code - z).detach()).view(-1, 32)), near

    def loss() -> Tensor:
        x, _ = some_digits(64)
        again, near = found(x)
        return F.mse_loss(again, x) + near

    fitted(build, model, steps, loss)
    x, _ = all_digits()
    return at_end(model, lambda: F.mse_loss(found(x)[0], x))


def deep_linear(build: Build, steps: int) -> float:
    """Eight linear layers and nothing between them, for a linear map."""
    model = network(32, *7 * [32], 16, activation=nn.Identity)
    wanted = torch.randn(32, 16, generator=fixed()) / 32**0.5

    def loss() -> Tensor:
        x = torch.randn(64, 32)
        return F.mse_loss(model(x), x @ wanted)

    return fitted(build, model, steps, loss)


def of(make: type[nn.Module]) -> functools.partial[float]:
    """What trains a classifier that a class makes."""
    return functools.partial(lambda make, build, steps: classified(build, steps, make()), make)


TASKS = {
    "batch-1": Task("digits, batches of 1", functools.partial(few, 1), 1500),
    "batch-4": Task("digits, batches of 4", functools.partial(few, 4), 1200),
    "logistic": Task("logistic regression", logistic, 1500),
    "sum": Task("digits, loss is a sum", summed, 800),
    "spectral": Task("spectral norm", spectral, 600),
    "weight-norm": Task("weight norm", weight_norm, 600),
    "wrong-labels": Task("30 % of labels drawn anew: test loss", wrong_labels, 600),
    "dropout": Task("convolutions with dropout", dropout, 400),
    "group-norm": Task("residual network with group norm", group_norm, 250),
    "experts": Task("mixture of experts", of(Experts), 600),
    "tied": Task("one layer, twelve times", of(Tied), 600),
    "changing": Task("four tasks, one after the other: all losses", changing, 800),
    "two-heads": Task("two heads", two_heads, 800),
    "contrastive": Task("contrastive, InfoNCE", contrastive, 600),
    "sigmoids": Task("autoencoder of sigmoids", sigmoids, 800),
    "codebook": Task("VQ-VAE: squared error", codebook, 500),
    "deep-linear": Task("deep linear network", deep_linear, 800),
}
