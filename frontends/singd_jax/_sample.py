"""Some of the rows of a factor, gathered without a check of the indices."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from singd_core import layers
from singd_core._array import Array


@dataclass(frozen=True)
class Sample(layers.Sample):
    """The core's, whose `take` would compile to three kernels: they write NaN beyond the array."""

    def take(
        self, x: Array, m: int, axis: int = 0, *, number: int = 0, shared: int = 1
    ) -> tuple[Array, float]:
        """`m` entries of `x` along an axis, and what they have to be multiplied by."""
        n = x.shape[axis]
        if m >= n:
            return x, 1.0
        indices = self.indices(n, m, x, axis=number, shared=shared)
        return jnp.take(x, indices, axis, mode="clip"), (n / m) ** 0.5
