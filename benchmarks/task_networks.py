"""The networks of the tasks."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from task_data import CONTEXT, CORA, SHORT, short_text, text, vocabulary, words
from torch import Tensor, nn

NOISE = 0.5  # deviation of the noise that the U-Net takes out

# ---- perceptrons and convolutions ---------------------------------------------------------------


def dense(widths: list[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return layers[:-1]


def mlp() -> nn.Module:
    """Two hidden layers for 8 × 8 images."""
    return nn.Sequential(nn.Flatten(), *dense([64, 128, 64, 10], nn.ReLU))


def wide_mlp() -> nn.Module:
    """Two wide hidden layers for 28 × 28 images."""
    return nn.Sequential(nn.Flatten(), *dense([784, 512, 512, 10], nn.ReLU))


def regression(features: int) -> nn.Module:
    """Two hidden layers, one output."""
    return nn.Sequential(*dense([features, 64, 64, 1], nn.Tanh))


def cnn(channels: list[int]) -> nn.Module:
    """Convolutions with pooling, and a linear layer on the 2 × 2 or 3 × 3 pixels that are left."""
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise([1, *channels]):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    left = 4 if len(channels) == 2 else 9
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * left, 10))


def vgg(stages: list[list[int]], c_in: int = 1, norm: bool = False) -> nn.Module:
    """Stages of 3 × 3 convolutions, a pooling behind each, a linear layer; 32 × 32 images."""
    layers: list[nn.Module] = []
    for stage in stages:
        for c in stage:
            between = [nn.BatchNorm2d(c)] if norm else []
            layers += [nn.Conv2d(c_in, c, 3, padding=1), *between, nn.ReLU()]
            c_in = c
        layers.append(nn.MaxPool2d(2))
    left = 32 >> len(stages)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c_in * left * left, 10))


class Residual(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.norm2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        same = stride == 1 and c_in == c
        self.around = nn.Identity() if same else nn.Conv2d(c_in, c, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inner + self.around(x)).relu()


def resnet(stride: int = 1) -> nn.Module:
    """Three residual blocks behind one convolution with a stride; images of any size."""
    first = nn.Conv2d(1, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1)
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


# ---- from images to images ----------------------------------------------------------------------


def autoencoder() -> nn.Module:
    """A deep autoencoder of 14 × 14 images with a bottleneck of 16 numbers."""
    return nn.Sequential(*dense([196, 128, 64, 32, 16, 32, 64, 128, 196], nn.Tanh))


class VariationalAutoencoder(nn.Module):
    """An autoencoder whose code of 16 numbers is drawn from a Gaussian."""

    def __init__(self, code: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*dense([196, 128, 64, 2 * code], nn.ReLU))
        self.decoder = nn.Sequential(*dense([code, 64, 128, 196], nn.ReLU))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of the pixels, and the code's mean and logarithmic variance."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


class UNet(nn.Module):
    """Takes out the noise that it adds to 14 × 14 images."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.down, self.middle = nn.Conv2d(c, 2 * c, 3, 2, 1), nn.Conv2d(2 * c, 2 * c, 3, 1, 1)
        self.join, self.last = nn.Conv2d(3 * c, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + NOISE * torch.randn_like(x)
        fine = F.silu(self.second(F.silu(self.first(x))))
        coarse = F.silu(self.middle(F.silu(self.down(fine))))
        return self.last(
            F.silu(self.join(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1)))
        )


# ---- attention ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Self-attention and a multilayer perceptron, each behind a normalization."""

    def __init__(self, d: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character or word."""

    def __init__(
        self, vocabulary: int, layers: int = 2, d: int = 64, heads: int = 4, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def transformer() -> nn.Module:
    """Two layers of width 64 for characters."""
    return Transformer(vocabulary(text()))


def word_model() -> nn.Module:
    """One layer of width 64 for words."""
    return Transformer(vocabulary(words()), layers=1, context=SHORT)


class VisionTransformer(nn.Module):
    """Three layers of width 48 over the 16 patches of a 28 × 28 image, or of other sizes."""

    def __init__(
        self,
        layers: int = 3,
        d: int = 48,
        heads: int = 4,
        *,
        channels: int = 1,
        side: int = 28,
        patch: int = 7,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, d, patch, patch)
        self.positions = nn.Parameter(torch.zeros((side // patch) ** 2, d))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block(d, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


# ---- a recurrence and a graph -------------------------------------------------------------------


class LSTM(nn.Module):
    """Predicts the next character, by a cell of two linear layers."""

    def __init__(self, vocabulary: int, d: int = 64) -> None:
        super().__init__()
        self.characters, self.inward = nn.Embedding(vocabulary, d), nn.Linear(d, 4 * d)
        self.recurrent, self.head = nn.Linear(d, 4 * d, bias=False), nn.Linear(d, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        inward = self.inward(self.characters(ids))
        hidden = cell = inward.new_zeros(len(ids), self.recurrent.in_features)
        found = []
        for t in range(ids.shape[1]):
            i, f, o, new = (inward[:, t] + self.recurrent(hidden)).chunk(4, -1)
            cell = (f + 1.0).sigmoid() * cell + i.sigmoid() * new.tanh()  # it starts by keeping
            hidden = o.sigmoid() * cell.tanh()
            found.append(hidden)
        return self.head(torch.stack(found, 1))


def lstm() -> nn.Module:
    """A cell of width 64."""
    return LSTM(vocabulary(short_text()))


class GraphNetwork(nn.Module):
    """Two graph convolutions (Kipf and Welling, arXiv 1609.02907) over the whole graph of Cora."""

    def __init__(self, hidden: int = 64, classes: int = 7) -> None:
        super().__init__()
        with np.load(CORA) as cora:
            n, edges = int(cora["n_nodes"]), torch.from_numpy(cora["edges"].astype(np.int64))
            words = torch.zeros(n, int(cora["n_features"]))
            words[cora["feature_rows"].astype(np.int64), cora["feature_cols"].astype(np.int64)] = 1
        loops = torch.arange(n).expand(2, n)
        ends = torch.cat([edges.T, edges.T.flip(0), loops], dim=1)
        scale = torch.bincount(ends[0], minlength=n) ** -0.5
        mean = torch.sparse_coo_tensor(ends, scale[ends[0]] * scale[ends[1]], (n, n))
        self.register_buffer("mean", mean.coalesce())  # over the neighbours
        self.register_buffer("words", F.normalize(words, p=1.0))
        self.hidden, self.head = nn.Linear(words.shape[1], hidden), nn.Linear(hidden, classes)

    def forward(self, papers: Tensor) -> Tensor:
        """The logits of some papers."""
        x = torch.sparse.mm(self.mean, self.hidden(self.words)).relu()
        return torch.sparse.mm(self.mean, self.head(F.dropout(x, training=self.training)))[papers]
