"""What is known of the calls of a model at a moment."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from singd_torch.layers.layer import Layer


class Now(threading.local):
    """What is so at a moment in one thread.

    Attributes:
        mode: The mode that is active, or None.
        outer: Each hooked module that is being called, and what was active before it.
        probed: The weight that was handed to the last call, if that was probed.
        doubtful: The layer of that call and why it gives no rows, unless a module made the call.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Have no call of a module."""
        self.mode: Any = None
        self.outer: list[tuple[Any, Any]] = []
        self.probed: Tensor | None = None
        self.doubtful: tuple[Layer, str] | None = None

    def settle(self, weight: Tensor | None = None) -> None:
        """Decide of the last call, which a module of a weight has made, or none has."""
        if self.doubtful is not None and self.doubtful[0].weight is not weight:
            self.doubtful[0].lose_rows(self.doubtful[1])
        self.probed = self.doubtful = None
