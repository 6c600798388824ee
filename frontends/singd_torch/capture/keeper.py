"""What a watcher asks of who has the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from singd_core.rules import Factors
from singd_torch.layers.layer import Layer

if TYPE_CHECKING:  # it imports DTensor, for a second
    from singd_torch.sharding.sharded import Sharded


class Keeper(Protocol):
    """Who has the factors that measure rows.

    Attributes:
        processes: Those that have copies of the model, if several have.
        sharded: What parts the work among processes, if something does.
    """

    processes: torch.distributed.ProcessGroup | None
    sharded: Sharded | None

    def factors(self, layer: Layer) -> Factors:
        """The factors that measure the rows of a layer."""

    def follow(self, new: dict[Tensor, nn.Parameter]) -> None:
        """Keep of these parameters what is kept of those in whose places they are."""

    def begin_anew(self, layer: Layer) -> None:
        """Keep nothing of a layer."""
