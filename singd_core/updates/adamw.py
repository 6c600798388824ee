"""AdamW, for the parameters that belong to no layer."""

from __future__ import annotations

import dataclasses
from typing import Self

from singd_core._array import Array, cast, device, expand, namespace, widen
from singd_core._tree import Tree, tree
from singd_core.settings import Rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback:
    """The settings of the fallback, with the names and defaults of torch.optim.AdamW."""

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Rate = 0.01


@tree
class Moments(Tree):
    """The running first and second moment of one parameter's gradient.

    Attributes:
        first: Average of the gradient, shaped like it.
        second: Average of its square, shaped like it, in at least float32.
        steps: How many steps were averaged, 0-d.
    """

    first: Array
    second: Array
    steps: Array

    @classmethod
    def zeros(cls, weight: Array) -> Self:
        """Before the first step."""
        xp = namespace(weight)
        wide = xp.zeros_like(widen(weight))
        steps = xp.zeros((), dtype=wide.dtype, device=device(weight))
        return cls(xp.zeros_like(weight), wide, steps)

    def update(self, gradient: Array, weight: Array, s: Fallback) -> tuple[Array, Self]:
        """The change of the weight, and the new moments (Loshchilov & Hutter, arXiv 1711.05101)."""
        (beta1, beta2), g = s.betas, widen(gradient)
        steps = self.steps + 1.0
        first = self.first * beta1 + cast(g * (1.0 - beta1), self.first)
        second = self.second * beta2 + g * g * (1.0 - beta2)
        mean = widen(first) / (1.0 - beta1**steps)
        scale = namespace(g).sqrt(second / (1.0 - beta2**steps)) + s.eps
        u = cast(mean / scale, weight) + weight * expand(s.weight_decay, weight)
        return u * expand(s.lr, u) * -1.0, type(self)(first, second, steps)
