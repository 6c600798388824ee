"""How the calls of a module give rows to a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from singd_core.layers import LayerKind


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """How the calls of a module give rows to a layer.

    Attributes:
        weight: The weight of the layer.
        kind: What turns input and output gradient into rows.
        part: Which part of a stack of layers they are rows of, or None.
        swapped: Whether inputs are rows of C and output gradients rows of K, as for a table of
            embeddings that shares its weight with a linear map.
        batch_second: Whether the batch is the second axis of three, not the first.
        biased: Whether the call adds the layer's bias, if it has one.
        name: The name of the weight in its module.
        by_output: Whether the module's input and output are the layer's.
        is_open: Whether calls of functions that are handed the weight give rows as well.
        kept: Which rows of a call are there, or None for all.
        samples: How many samples a call has, or None where these have an axis of the input.
    """

    weight: Tensor
    kind: LayerKind
    part: int | None = None
    swapped: bool = False
    batch_second: bool = False
    biased: bool = True
    name: str = "weight"
    by_output: bool = True
    is_open: bool = True
    kept: Tensor | None = None
    samples: int | None = None

    def of(self, new: Mapping[Tensor, Tensor]) -> Source:
        """The same of the weight that is in the place of its own now."""
        return dataclasses.replace(self, weight=new.get(self.weight, self.weight))

    def samples_axis(self, x: Tensor) -> int:
        """Which axis of an input, and of its output, has the samples."""
        return 1 if self.batch_second and x.ndim == 3 else 0
