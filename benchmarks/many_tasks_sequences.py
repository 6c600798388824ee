"""Tasks of `many.py`: text and other sequences."""

from __future__ import annotations

import collections
import functools
import re

import task_data
import torch
import torch.nn.functional as F
from many_tasks_common import Task, fitted
from noisy import Build, network
from task_networks import Block
from tasks import symbol_loss
from torch import Tensor, nn

# ---- text ---------------------------------------------------------------------------------------


def some_text(n: int) -> tuple[Tensor, Tensor]:
    """Windows of 32 characters, and the next of each."""
    (x, y), _ = task_data.short_text()
    rows = torch.randint(len(x), (n,))
    return x[rows], y[rows]


def characters() -> int:
    """How many there are."""
    return task_data.vocabulary(task_data.short_text())


def predicted(build: Build, steps: int, model: nn.Module) -> float:
    """Train a model to predict the next character."""

    def loss() -> Tensor:
        x, y = some_text(16)
        return symbol_loss(model(x), y)

    return fitted(build, model, steps, loss)


class Embedded(nn.Module):
    """Characters with their places, layers of width 32, and a head."""

    def __init__(self, inner: nn.Module, symbols: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, 32), nn.Embedding(32, 32)
        self.inner, self.head = inner, nn.Linear(32, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.symbols(x) + self.places(torch.arange(x.shape[1]))))


class Behind(nn.Module):
    """Attention and a perceptron, with a norm behind each or with none at all."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.perceptron = network(32, 64, 32, activation=nn.GELU)
        self.norm1, self.norm2 = (nn.LayerNorm(32) if norms else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.perceptron(x))


def transformer(norms: bool, build: Build, steps: int) -> float:
    """Three blocks of a transformer."""
    inner = nn.Sequential(*(Behind(norms) for _ in range(3)))
    return predicted(build, steps, Embedded(inner, characters()))


def masked(build: Build, steps: int) -> float:
    """A transformer that finds one character in five, which it does not see."""
    hidden = characters()
    model = Embedded(nn.Sequential(*(Block(32, 4, causal=False) for _ in range(2))), hidden + 1)

    def loss() -> Tensor:
        x, _ = some_text(16)
        at = torch.rand(x.shape) < 0.2
        return F.cross_entropy(model(x.masked_fill(at, hidden))[at], x[at])

    return fitted(build, model, steps, loss)


class Dilated(nn.Module):
    """Four convolutions that look back 1, 2, 4 and 8 characters."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols, self.head = nn.Embedding(symbols, 32), nn.Conv1d(32, symbols, 1)
        self.layers = nn.ModuleList(nn.Conv1d(32, 32, 2, dilation=2**i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.symbols(x).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            z = z + layer(F.pad(z, (2**i, 0))).relu()
        return self.head(z).transpose(1, 2)


class StateSpace(nn.Module):
    """States that fade at rates of their own, computed as a convolution over all places."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols, self.head = nn.Embedding(symbols, 32), nn.Linear(32, symbols)
        self.fade = nn.Parameter(torch.linspace(-3.0, 1.0, 64))
        self.inward, self.outward = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        given = self.symbols(x)
        back = torch.arange(x.shape[1], dtype=torch.float32)
        apart = (back[:, None] - back).clamp(min=0.0)[..., None]
        weights = (-self.fade.exp() * apart).exp() * (back[:, None] >= back)[..., None]
        state = torch.einsum("tsd,bsd->btd", weights, self.inward(given))
        return self.head(given + self.outward(F.gelu(state)))


@functools.cache
def common_words() -> Tensor:
    """The text as numbers of its 2000 most frequent words; others are left out."""
    found = re.findall(r"[a-z']+", task_data._characters().lower())
    numbers = {w: i for i, (w, _) in enumerate(collections.Counter(found).most_common(2000))}
    return torch.tensor([numbers[word] for word in found if word in numbers])


def skip_grams(build: Build, steps: int) -> float:
    """Words by their neighbours, against five words that were drawn (word2vec)."""
    model = nn.ModuleDict({name: nn.Embedding(2000, 32) for name in ("word", "near")})
    for table in model.values():
        nn.init.normal_(table.weight, std=0.1)
    words = common_words()

    def loss() -> Tensor:
        at = torch.randint(2, len(words) - 2, (256,))
        off = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (256,))]
        drawn = words[torch.randint(len(words), (256, 5))]
        near = torch.cat([words[at + off][:, None], drawn], 1)
        scores = (model["word"](words[at])[:, None] * model["near"](near)).sum(-1)
        return -F.logsigmoid(scores[:, 0]).mean() - F.logsigmoid(-scores[:, 1:]).sum(1).mean()

    return fitted(build, model, steps, loss)


# ---- other sequences ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    """torch's GRU or LSTM, and a linear layer on what it found."""

    def __init__(self, kind: type[nn.RNNBase], d_in: int, d: int, d_out: int) -> None:
        super().__init__()
        self.inner, self.head = kind(d_in, d, batch_first=True), nn.Linear(d, d_out)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


def adding(build: Build, steps: int) -> float:
    """The sum of the two numbers of 20 that are marked, by a GRU."""
    model = Recurrent(nn.GRU, 2, 32, 1)

    def loss() -> Tensor:
        x, marks = torch.rand(32, 20), torch.zeros(32, 20)
        for half in (torch.randint(10, (32, 1)), torch.randint(10, 20, (32, 1))):
            marks.scatter_(1, half, 1.0)
        found = model(torch.stack([x, marks], 2))[:, -1, 0]
        return F.mse_loss(found, (x * marks).sum(1))

    return fitted(build, model, steps, loss)


def copying(build: Build, steps: int) -> float:
    """Four symbols to be said again after a pause of eight places, by an LSTM."""
    model = Recurrent(nn.LSTM, 10, 48, 8)

    def loss() -> Tensor:
        symbols = torch.randint(8, (32, 4))
        x = torch.cat([symbols, torch.full((32, 8), 8), torch.full((32, 4), 9)], 1)
        return symbol_loss(model(F.one_hot(x, 10).float())[:, -4:], symbols)

    return fitted(build, model, steps, loss)


class Reversal(nn.Module):
    """An encoder and a decoder, which attends to what the encoder found."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.head = nn.Embedding(11, 32), nn.Linear(64, 10)
        self.encoder, self.decoder = (nn.GRU(32, 32, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        seen, last = self.encoder(self.symbols(x))
        said, _ = self.decoder(self.symbols(before), last)
        found = (said @ seen.transpose(1, 2)).softmax(-1) @ seen
        return self.head(torch.cat([said, found], -1))


def reversal(build: Build, steps: int) -> float:
    """Eight symbols in reverse, each when those before it are known."""
    model = Reversal()

    def loss() -> Tensor:
        x = torch.randint(10, (32, 8))
        wanted = x.flip(1)
        before = torch.cat([torch.full((32, 1), 10), wanted[:, :-1]], 1)
        return symbol_loss(model(x, before), wanted)

    return fitted(build, model, steps, loss)


def modular(build: Build, steps: int) -> float:
    """a + b modulo 31, for all 961 pairs."""
    model = nn.Sequential(
        nn.Embedding(31, 32), nn.Flatten(), *network(64, 64, 31, activation=nn.ReLU)
    )
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))

    def loss() -> Tensor:
        x = pairs[torch.randint(961, (128,))]
        return F.cross_entropy(model(x), x.sum(1) % 31)

    return fitted(build, model, steps, loss)


def of(make: type[nn.Module]) -> functools.partial[float]:
    """What trains a model of characters that a class makes."""
    return functools.partial(
        lambda make, build, steps: predicted(build, steps, make(characters())), make
    )


TASKS = {
    "post-norm": Task("transformer, norms behind", functools.partial(transformer, True), 300),
    "no-norm": Task("transformer without norms", functools.partial(transformer, False), 300),
    "masked": Task("masked characters", masked, 400),
    "dilated": Task("dilated convolutions on characters", of(Dilated), 400),
    "state-space": Task("state space layer on characters", of(StateSpace), 400),
    "skip-grams": Task("word2vec", skip_grams, 1000),
    "adding": Task("GRU that adds", adding, 600),
    "copying": Task("LSTM that copies", copying, 600),
    "reversal": Task("encoder and decoder that reverse", reversal, 400),
    "modular": Task("addition modulo 31", modular, 800),
}
