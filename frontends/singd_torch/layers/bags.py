"""Bags of look-ups in a table, which one call sums: each look-up has a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from singd_torch.layers.products import MatrixRows


@dataclasses.dataclass(frozen=True)
class Bags:
    """What a call of `embedding_bag` does with its look-ups.

    Attributes:
        starts: The first look-up of each bag, of an input with one axis; or None.
        weights: What each look-up is multiplied by, of the shape of the input; or None.
        is_mean: Whether sums are divided by the number of look-ups, the padding left out.
        padding_idx: The entry that counts for nothing, or None.
    """

    starts: Tensor | None
    weights: Tensor | None
    is_mean: bool
    padding_idx: int | None

    @classmethod
    def of(cls, given: Mapping[str, Any], padding_idx: int | None) -> Bags:
        """From the arguments of the call by name."""
        starts, weights = given.get("offsets"), given.get("per_sample_weights")
        if starts is not None and given.get("include_last_offset"):
            starts = starts[:-1]
        return cls(starts, weights, given.get("mode", "mean") == "mean", padding_idx)

    def __call__(self, x: Tensor, g: Tensor, most: int) -> Iterator[MatrixRows]:
        """Of indices `(bags, length)` or `(look-ups,)` and the gradient `(bags, d_out)`.

        A look-up has the gradient of its bag, times its weight. The host does not wait to know how
        long bags are.
        """
        bag, samples = self._bag_of_each(x), None if self.starts is None else len(g)
        seen = torch.ones_like(x) if self.padding_idx is None else x != self.padding_idx
        share = seen.to(g.dtype)
        if self.is_mean:
            lengths = torch.zeros(len(g), dtype=torch.int64, device=x.device)
            lengths.index_add_(0, bag.flatten(), seen.flatten().long())
            share = share / lengths.clamp(min=1)[bag]
        if self.weights is not None:
            share = share * self.weights
        yield MatrixRows(None, x, g[bag].mul_(share[..., None]), samples=samples)

    def _bag_of_each(self, x: Tensor) -> Tensor:
        """The number of the bag of each look-up."""
        if self.starts is None:
            return torch.arange(len(x), device=x.device)[:, None].expand(x.shape)
        places = torch.arange(len(x), device=x.device, dtype=self.starts.dtype)
        return torch.bucketize(places, self.starts, right=True) - 1
