"""The tasks on which the paper's claims are shown: each with data to validate on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import task_data as data
import task_networks as networks
import torch
import torch.nn.functional as F
from race_tasks import FASHION, fashion
from task_data import CORA, Data, Split
from tasks import TASKS, Task, accuracy
from torch import Tensor

TRAIN, VALIDATE, TEST = 3200, 1000, 1000  # images of Fashion-MNIST
STAGES = [[8], [16], [32, 32]]  # as in VGG-11, channels and stages fewer
LARGE = "images"  # the task of a large vision transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperTask(Task):
    """A task with data that settings are chosen by.

    Attributes:
        validation: Gives inputs and targets.
    """

    validation: Callable[[], Split]

    @property
    def tested(self) -> dict[str, int]:
        """What is measured on test data, and its column in the points of a curve."""
        return {self.metric_name: 4} | {"loss": 3}  # one column where the loss is the metric


# ---- data ---------------------------------------------------------------------------------------


@functools.cache
def _fashion() -> tuple[Split, Split, Split]:
    """Some of Fashion-MNIST for training, validation and testing, framed with black to 32 × 32."""
    train, (x_test, y_test) = fashion()
    x, y = (part[: TRAIN + VALIDATE] for part in train)
    x, x_test = (F.pad(images, (2, 2, 2, 2)) for images in (x, x_test[:TEST]))
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), (x_test, y_test[:TEST])


def _images() -> Data:
    train, _, test = _fashion()
    return train, test


@functools.cache
def _text() -> tuple[Split, Split, Split]:
    """The windows of text. The last windows to train on become the windows to validate on."""
    (x, y), test = data.text()
    n = len(x) - len(test[0])
    return (x[:n], y[:n]), (x[n:], y[n:]), test


def _papers() -> Split:
    """The 500 papers of Cora's standard split."""
    with np.load(CORA) as cora:
        chosen = torch.from_numpy(cora["val"])
        return chosen, torch.from_numpy(cora["labels"].astype(np.int64))[chosen]


class Folder:
    """Images of a folder with one folder for each class, read when they are asked for."""

    def __init__(self, paths: list[Path], pixels: int) -> None:
        self.paths, self.pixels = paths, pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: Any) -> Tensor | Folder:
        """The images of some numbers, shape (n, 3, pixels, pixels), or a part of the folder."""
        if isinstance(chosen, slice):
            return Folder(self.paths[chosen], self.pixels)
        return torch.stack([self._read(self.paths[i]) for i in chosen.tolist()])

    def split(self, size: int) -> list[Tensor]:
        """The images in parts."""
        parts = torch.arange(len(self)).split(size)
        return [self[part] for part in parts]  # type: ignore[misc]

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as image:
            small = image.convert("RGB").resize((self.pixels, self.pixels))
        return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255.0


@functools.cache
def _folder(root: Path, pixels: int) -> tuple[Any, Any, Any, int]:
    """Eight tenths of a folder's images to train on, one to validate and one to test on."""
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    found = [(path, i) for i, folder in enumerate(classes) for path in sorted(folder.rglob("*.*"))]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    labels = torch.tensor([found[i][1] for i in order])
    images = Folder([found[i][0] for i in order], pixels)
    first, second = len(found) * 8 // 10, len(found) * 9 // 10
    cuts = slice(0, first), slice(first, second), slice(second, None)
    train, validation, test = ((images[cut], labels[cut]) for cut in cuts)
    return train, validation, test, len(classes)


# ---- tasks --------------------------------------------------------------------------------------

_classify = functools.partial(
    PaperTask,
    data=_images,
    validation=lambda: _fashion()[1],
    loss=F.cross_entropy,
    metric=accuracy,
    metric_name="accuracy",
    steps=120,
    batch=32,
    needs=FASHION,
)


def _of(name: str, **changed: Any) -> PaperTask:
    """A task of the comparison, with data to validate on."""
    fields = {f.name: getattr(TASKS[name], f.name) for f in dataclasses.fields(Task)}
    return PaperTask(**fields | changed)


PAPER_TASKS: dict[str, PaperTask] = {
    "gcn": _of("gcn", title="GCN on Cora", validation=_papers),
    "transformer": _of(
        "transformer",
        data=lambda: (_text()[0], _text()[2]),
        validation=lambda: _text()[1],
        steps=100,
        batch=16,
    ),
    "vit": _classify(
        title="vision transformer on Fashion-MNIST",
        model=functools.partial(networks.VisionTransformer, side=32, patch=8),
    ),
    "vgg": _classify(
        title="VGG-like network on Fashion-MNIST",
        model=functools.partial(networks.vgg, STAGES),
    ),
    "resnet": _classify(
        title="ResNet-like network on Fashion-MNIST",
        model=functools.partial(networks.resnet, stride=2),
    ),
    "vgg-norm": _classify(
        title="VGG-like network with batch norm on Fashion-MNIST",
        model=functools.partial(networks.vgg, STAGES, norm=True),
    ),
}


def add_large(root: Path, layers: int, d: int, heads: int, pixels: int, patch: int) -> None:
    """The task of a vision transformer of any size on a folder of images: ten passes over them."""
    train, validation, test, classes = _folder(root, pixels)
    batch = 128
    PAPER_TASKS[LARGE] = _classify(
        title=f"vision transformer, {layers} layers of width {d}, on {len(train[0])} images",
        data=lambda: (train, test),
        validation=lambda: validation,
        model=functools.partial(
            networks.VisionTransformer,
            *(layers, d, heads),
            side=pixels,
            patch=patch,
            channels=3,
            classes=classes,
        ),
        steps=10 * max(len(train[0]) // batch, 1),
        batch=batch,
        needs=root,
    )
