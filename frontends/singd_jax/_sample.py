"""Some of the rows of a factor, by few equations: every layer has them, and XLA reads each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from singd_core import layers
from singd_core._array import Array
from singd_core.layers._sampling import AXES, stride


@dataclass(frozen=True)
class Sample(layers.Sample):
    """The core's, of the shares that a step begins with in place of the step."""

    @staticmethod
    def shares(step: Array) -> Array:
        """What is the same for all layers: the share of each axis, shape (axes,)."""
        core = layers.Sample(0, step)
        return jnp.stack([core.share(axis) for axis in range(AXES)])

    def share(self, axis: int) -> Any:
        """The share of its length that the axis of this number starts at."""
        return jax.lax.index_in_dim(self.step, axis % AXES, keepdims=False)

    def indices(self, n: int, m: int, like: Array, *, axis: int = 0) -> Array:
        """`m` of the indices below `n`, without a sign that XLA would look at."""
        strides = stride(n, m) * np.arange(m, dtype=np.uint32)
        start = jax.lax.convert_element_type(self.start(n, axis), jnp.uint32)
        return jax.lax.rem(start + strides, jnp.full((m,), n, jnp.uint32))

    def take(self, x: Array, m: int, axis: int = 0, *, number: int = 0) -> tuple[Array, float]:
        """`m` entries of `x` along an axis, and what they have to be multiplied by.

        Without a check of the indices, which would be three kernels: they write NaN beyond x.
        """
        n = x.shape[axis]
        if m >= n:
            return x, 1.0
        indices = self.indices(n, m, x, axis=number)
        return jnp.take(x, indices, axis, mode="clip"), (n / m) ** 0.5
