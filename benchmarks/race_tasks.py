"""The six tasks of the race; one of them is only here, since it needs data from elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from task_data import CORA, Data, Split
from task_networks import cnn
from tasks import TASKS, Task, accuracy
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@functools.cache
def fashion() -> Data:
    """Fashion-MNIST, 28 × 28, split 60000 / 10000."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(FASHION / f"{name}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())

    def split(name: str) -> Split:
        images = read(f"{name}-images-idx3", 16).reshape(-1, 1, 28, 28)
        return images / 255.0, read(f"{name}-labels-idx1", 8).long()

    return split("train"), split("t10k")


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
        TASKS["gcn"],
        5.0,
        (CORA, "the citation graph of the planetoid repository, repacked"),
    ),
    "wide": Race(TASKS["wide-mlp"], 6.0),
    "vit": Race(TASKS["vit"], 12.0),
}
