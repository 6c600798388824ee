"""A model that several processes train, or one."""

from collections.abc import Callable
from typing import Any

import models
from test_fully_shard import shard
from torch.distributed.device_mesh import init_device_mesh

from singd_torch import SINGD

NAME = "characters"


class Run:
    """A model, its optimizer and this process's data. With several processes it is in parts."""

    def __init__(self, rank: int, world: int, before: Callable[[Any], None] | None = None) -> None:
        self.rank, self.world = rank, world
        self.model: Any = models.new(NAME)
        if before is not None:
            before(self.model)
        self.given: dict[str, Any] = {}
        self.policy: dict[str, Any] = {}

    def build(self, **given: Any) -> SINGD:
        if self.world > 1:
            shape = (2, 2) if self.world == 4 else (self.world,)
            names = ("copies", "parts")[-len(shape) :]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            shard(self.model, mesh, **self.policy)
        self.optimizer = SINGD(self.model, **models.settings(NAME, **given))
        return self.optimizer

    def part(self, batch: models.Data) -> models.Data:
        return models.part_of(batch, self.rank, self.world)

    def backward(self, batch: models.Data, share: float = 1.0) -> None:
        (models.loss(self.model, *batch) * share).backward()
