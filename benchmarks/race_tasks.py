"""The four tasks of the race; two of them are only here, since they need data from elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tasks import DATA, TASKS, Split, Task, accuracy, cnn
from torch import Tensor, nn

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
CORA = DATA / "cora" / "cora.npz"


@functools.cache
def fashion() -> tuple[Split, Split]:
    """Fashion-MNIST, 28 × 28, split 60000 / 10000."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(FASHION / f"{name}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())

    def split(name: str) -> Split:
        images = read(f"{name}-images-idx3", 16).reshape(-1, 1, 28, 28)
        return images / 255.0, read(f"{name}-labels-idx1", 8).long()

    return split("train"), split("t10k")


@functools.cache
def citations() -> tuple[Split, Split]:
    """The papers of Cora by number, with their topics; the standard split 140 / 1000."""
    with np.load(CORA) as cora:
        labels = torch.from_numpy(cora["labels"].astype(np.int64))
        train, test = (torch.from_numpy(cora[name]) for name in ("train", "test"))
    return (train, labels[train]), (test, labels[test])


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


@dataclasses.dataclass(frozen=True)
class Race:
    """A task, and the seconds that each training takes.

    Attributes:
        task: The task.
        seconds: Of each training.
        data: A file or folder that has to be there, and where it is from.
    """

    task: Task
    seconds: float
    data: tuple[Path, str] | None = None

    @property
    def missing(self) -> str:
        """What to get before this can run, or nothing."""
        if self.data is None or self.data[0].exists():
            return ""
        return f"{self.task.title} needs {self.data[0]}, {self.data[1]}"


_classify = functools.partial(
    Task, loss=F.cross_entropy, metric=accuracy, metric_name="accuracy", steps=0
)

RACES = {
    "digits": Race(TASKS["digits-cnn"], 6.0),
    "fashion": Race(
        _classify(
            title="CNN on Fashion-MNIST",
            data=fashion,
            model=functools.partial(cnn, [8, 16, 32]),
        ),
        16.0,
        (FASHION, "of Debian's package dataset-fashion-mnist"),
    ),
    "transformer": Race(TASKS["transformer"], 24.0),
    "cora": Race(
        _classify(title="graph network on Cora", data=citations, model=GraphNetwork, batch=140),
        5.0,
        (CORA, "the citation graph of the planetoid repository, repacked"),
    ),
}
