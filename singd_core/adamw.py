"""AdamW, for the parameters that belong to no layer."""

from __future__ import annotations

import dataclasses
from typing import Self

from singd_core._array import Array, cast, chain, device, expand, namespace, widen
from singd_core._scalars import at_least
from singd_core._settings import Rate
from singd_core._tree import Tree, tree

# The root of the smallest normal number of float32. Squares of smaller gradients may be 0, and
# with ε = 0 their step would be NaN or without bounds.
LEAST_EPS = 2.0**-63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback:
    """The settings of AdamW, with the names of torch.optim.AdamW.

    Attributes:
        lr: The rate. None is the rate of the recipe: 0.01 for "normalized", and 0.001 for "paper".
        betas: The rates at which the average of gradients and of their squares forget.
        eps: ε, what is added to the root of the average of squares; a smaller one than 2^−63 counts
            as that, so that entries without gradients do not move.
        weight_decay: The decoupled decay. None is 0.01, or 0 where `weight_decay=0.0` is given for
            the matrices.
    """

    lr: Rate | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Rate | None = None


@tree
class Moments(Tree):
    """The running moments of one parameter's gradient, named as in torch.optim.AdamW.

    Attributes:
        exp_avg: Average of the gradient, shaped like it.
        exp_avg_sq: Average of its square (|g|² of complex ones), shaped like it, real, in at least
            float32.
        step: How many steps were averaged, 0-d.
        compensation: What rounding has cost the parameter, or None unless that is kept.
    """

    exp_avg: Array
    exp_avg_sq: Array
    step: Array
    compensation: Array | None = None

    @classmethod
    def zeros(cls, weight: Array) -> Self:
        """Before the first step."""
        xp = namespace(weight)
        wide = abs(xp.zeros_like(widen(weight)))  # real
        step = xp.zeros((), dtype=wide.dtype, device=device(weight))
        return cls(xp.zeros_like(weight), wide, step)

    def update(self, gradient: Array, weight: Array, s: Fallback) -> tuple[Array, Self]:
        """The change of the weight, and the new moments (Loshchilov & Hutter, arXiv 1711.05101)."""
        (beta1, beta2), step = s.betas, self.step + 1.0
        own = widen(self.exp_avg)
        first, second, u = _averaged(
            *(cast(gradient, own), own, self.exp_avg_sq),
            *(beta1, 1.0 - beta1, beta2, 1.0 - beta2),
            *(1.0 - beta1**step, 1.0 - beta2**step, at_least(s.eps, LEAST_EPS)),
        )
        u = cast(u, weight) + weight * expand(s.weight_decay, weight)
        return u * expand(s.lr, u) * -1.0, type(self)(cast(first, self.exp_avg), second, step)


@chain
def _averaged(
    g: Array,
    first: Array,
    second: Array,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    unbias1: Array,
    unbias2: Array,
    eps: float,
) -> tuple[Array, Array, Array]:
    """The new moments, and the direction m̂ / (√v̂ + ε)."""
    first = first * beta1 + g * rest1
    square = g * g if g.dtype == second.dtype else abs(g) ** 2  # of complex numbers
    second = second * beta2 + square * rest2
    return first, second, first / unbias1 / ((second / unbias2) ** 0.5 + eps)
