"""The inputs of a layer without their mean, which the gradients of its weight and bias tell.

A layer W x + b is W (x − μ) + b', with b' = b + W μ. Section 6 of docs/mathematics.md has the
equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from singd_core._array import (
    Array,
    Scalar,
    cast,
    multiply_add,
    namespace,
    sum_of_squares,
    wide_full,
)
from singd_core._scalars import at_least
from singd_core._settings import Rate
from singd_core._tree import Tree, tree
from singd_core.curvature import TINY
from singd_core.levels import weight_of

# The gradient of a bias tells nothing where it is smaller than this share of its weight's: it may
# be the rounding of 8 bits, as of a bias whose layer is normalized afterwards.
NOISE = 2.0**-8

# A gradient has rank one if G − g μᵀ has at most this share of its squares.
RANK_ONE = 2.0**-10


class InputSums(NamedTuple):
    """Sums over the rows of the gradients G and g of a weight and its bias.

    Attributes:
        cross: Gᵀ g, shape (..., d_in).
        own: ‖g‖², of the batch axes' shape.
        all: ‖G‖².
    """

    cross: Array
    own: Array
    all: Array

    @classmethod
    def of(cls, G: Array, g: Array, like: Array) -> Self:
        """Of G, shape (..., d_out, d_in), and g, shape (..., d_out, 1), in the dtype of `like`."""
        G, g = cast(G, like), cast(g, like)
        return cls(cross(G, g), sum_of_squares(g, 2), sum_of_squares(G, 2))


@tree
class InputMean(Tree):
    """The mean of a layer's inputs, as far as gradients tell it.

    Attributes:
        mean: μ, shape (..., d_in).
        squares: The mean of ‖g‖² so far, of the batch axes' shape.
        used: 1 where steps are without the mean, else 0: where the inputs are the same in all
            examples, nothing is left of their gradient without it.
    """

    mean: Array
    squares: Array
    used: Array

    @classmethod
    def zeros(cls, batch: Sequence[int], d_in: int, like: Array) -> Self:
        """Before the first refresh, on the device of `like`."""
        numbers = (wide_full(batch, 0.0, like=like) for _ in range(2))
        return cls(wide_full((*batch, d_in), 0.0, like=like), *numbers)

    def told(
        self,
        sums: InputSums,
        k: Scalar,
        lr_cov: Rate,
        spread: Callable[[Array], Array] = lambda c: c[..., None],
        squares_of: Callable[[Array], Array] = lambda x: sum_of_squares(x, 1),
    ) -> Self:
        """After one more gradient at a refresh, after k refreshes (6.2 and 6.3).

        Means of matrices of several shapes may stand in one vector. Then `spread` says how a number
        of each matrix is one of each column, and `squares_of` sums the squares of its columns.
        """
        own, old, weight = sums.own, self.mean, weight_of(k + 1.0, lr_cov)
        hat = sums.cross / at_least(spread(own), TINY)
        rest = sums.all - own * squares_of(hat)
        # a gradient of rank one leaves no rest to compare g with: it is compared with G itself
        of_weight = namespace(old).where(rest > RANK_ONE * sums.all, rest, sums.all)
        counts = (own > TINY) & (own > NOISE * NOISE * of_weight)
        squares = self.squares + weight * (own - self.squares)
        mean = old + spread(weight * own / at_least(squares, TINY)) * (hat - old)
        left = at_least(rest, 0.0) + own * squares_of(mean - hat)  # ‖G − g μᵀ‖²
        used = cast(left > NOISE * NOISE * own * squares_of(mean), old)
        # what is not finite counts for nothing
        xp = namespace(old)
        return type(self)(
            xp.where(spread(counts), mean, old),
            xp.where(counts, squares, self.squares),
            xp.where(counts, used, self.used),
        )

    def centered(self, G: Array, g: Array, out: Array | None = None) -> Array:
        """The gradient G − g μᵀ of W, where b' stays as it is and not b.

        G has shape (..., d_out, d_in), g has shape (..., d_out, 1), and `out` may be overwritten.
        """
        return centered(G, g, -1.0 * self._mean, out)

    def along(self, W: Array) -> Array:
        """W μ, of W or of a change of it, shape (..., d_out, 1)."""
        return along(W, self._mean)

    @property
    def _mean(self) -> Array:
        return self.mean * self.used[..., None]


def cross(G: Array, g: Array) -> Array:
    """Gᵀ g, shape (..., d_in)."""
    return (G.mT @ g)[..., 0]


def centered(G: Array, g: Array, minus: Array, out: Array | None = None) -> Array:
    """`InputMean.centered`, of `minus` μ."""
    return multiply_add(cast(g, G), cast(minus, G)[..., None, :], G, out)


def along(W: Array, mean: Array) -> Array:
    """W μ, shape (..., d_out, 1)."""
    return W @ cast(mean, W)[..., None]
