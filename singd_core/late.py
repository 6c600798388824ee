"""How much late gradients agree, how small they are, and what both say of the size of steps.

Section 5 of docs/mathematics.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from singd_core._array import Array, Scalar, cast, device, multiply_add, namespace, wide_full
from singd_core._scalars import (
    as_array,
    at_least,
    at_most,
    clip,
    exp,
    log,
    number,
    numbers,
    where,
)
from singd_core._settings import Settings, StepSettings
from singd_core._tree import Tree, tree
from singd_core.curvature import TINY

# Where late gradients agree so much more than noise, steps are too short: each makes the next ones
# longer by up to `GROWTH`, to at most 55 times. Where they agree less than this share of noise,
# steps that have become longer are too long. The first numbers are of steps as they are. The second
# are of steps that have become longer by `SURE`, in logarithms: longer ones take clearer signs.
AGREE = 1.8, 3.0
OPPOSE = 0.6, 1.0
SURE = 2.0
GROWTH = 0.15
LONGEST = 4.0  # and the shortest are as much shorter
# Gradients that vanish agree, as of a network that fits its data, and longer steps would carry the
# weights away: e^h is at most e^VANISHED √v, and 1 where this is less.
VANISHED = 8.0
# Steps become no longer where the last gradient is at most this share of the sum of squares: the
# average is of earlier gradients that agreed, and leads away from data that are fitted by now.
FADED = 1e-4
# Where they agree so little, the weights swing to and fro, and steps as they are are too long.
TURN = 0.05
# A rate is constant if it is this share of the largest, but for rounding. At a constant rate this
# share of longer steps is forgotten in each step, or noise would keep them for good. Where late
# gradients agree no more than `NOISE`, steps become shorter as the power `SETTLE` of time.
CONSTANT = 0.999
FORGET = 0.03
NOISE = 1.5
SETTLE = 0.5
# It begins when the sums have forgotten that they began with nothing.
_FORGOTTEN = 0.88

# Late gradients that are smaller than earlier ones make steps shorter by the same factor, to at
# least this, unless a schedule has made them so already. It begins after that many steps.
SHORTEST = 0.14
BEGINNING = 60.0
MEMORY = 1000.0  # how many steps back earlier gradients count

# So many times ‖∇W‖² has to be in range, or the step is skipped: the sum over late gradients is
# larger by up to 1 / (1 − α), and as much once more where the sum of weights multiplies it.
ROOM = 2.0**20


@tree
class Late(Tree):
    """Sums over the gradients of each matrix: late ones are weighted as in the momentum.

    Attributes:
        squares: Σⱼ αʲ ‖∇Wₜ₋ⱼ‖², of the batch axes' shape.
        weights: Σⱼ αʲ, of the batch axes' shape.
        noise: Σⱼ α²ʲ ‖∇Wₜ₋ⱼ‖², of the batch axes' shape.
        growth: The logarithm of how much longer steps have become, of the batch axes' shape.
        mean: The mean of ‖∇W‖² over about the last thousand steps, of the batch axes' shape.
        steps: The number of steps, of the batch axes' shape.
    """

    squares: Array
    weights: Array
    noise: Array
    growth: Array
    mean: Array
    steps: Array

    @classmethod
    def zeros(cls, batch: Sequence[int], like: Array, *, with_bias: bool = False) -> Self:
        """Before the first step, on the device of `like`; `with_bias` as `paired` makes them."""
        shape = (*batch, 2) if with_bias else batch
        return cls(*(wide_full(shape, 0.0, like=like) for _ in cls.field_names()))

    def numbers(self) -> Self:
        """With numbers in place of 0-d arrays, where the host need not wait for them."""
        return self.map(number)

    def paired(self, of_weight: Self, of_bias: Self) -> Self:
        """The sums of a weight and of its bias along a last axis, as arrays like these."""
        return self.map(_pair, of_weight, of_bias)

    def parted(self) -> tuple[Self, Self]:
        """The sums of a weight and of its bias, which are along a last axis, as `numbers`."""
        pairs = [numbers(a) for _, a in self.named_arrays()]
        one, two = (self.rebuild(pair[i] for pair in pairs) for i in (0, 1))
        return one, two

    def written(self, sums: Self) -> Self:
        """What came of `numbers`, as arrays like these."""
        return self.map(lambda old, new: cast(as_array(new, old), old), sums)

    def update(self, squares: Scalar, s: Settings) -> Self:
        """One step later, with ‖∇W‖²."""
        steps = self.steps + 1.0
        mean = self.mean + (squares - self.mean) / at_most(steps, MEMORY)
        noise = multiply_add(self.noise, s.momentum * s.momentum, squares)
        return type(self)(*self._added(squares, s), noise, self.growth, mean, steps)

    def _added(self, squares: Scalar, s: Settings) -> tuple[Scalar, Scalar]:
        return (
            multiply_add(self.squares, s.momentum, squares),
            multiply_add(self.weights, s.momentum, 1.0),
        )

    def smaller(self) -> Scalar:
        """The mean square of late gradients over the mean of about the last thousand."""
        return self.squares / at_least(self.weights * self.mean, TINY)

    def grown(
        self,
        ratio: Scalar,
        smaller: Scalar,
        squares: Scalar,
        moves: Array | bool,
        s: StepSettings,
    ) -> Self:
        """With steps that are longer or shorter, after this step.

        Args:
            ratio: How much late gradients agree, over noise: what `over_noise` returns.
            smaller: What `smaller` returns.
            squares: ‖∇W‖² of this step.
            moves: Whether that is not zero.
            s: The settings.
        """
        longer = at_least(self.growth, 0.0)
        sure = at_most(longer, SURE)
        # how far it is above and below what is asked for, up and down by at most 1
        above, below = (multiply_add(sure, (a - b) / SURE, ratio) for a, b in (AGREE, OPPOSE))
        low, high = AGREE[0], OPPOSE[0]
        less = (low + high) - (clip(above, low, low + 1.0) + at_most(below, high))
        less = at_most(less * GROWTH, longer)
        less = less + at_least(multiply_add(ratio, -GROWTH / TURN, GROWTH), 0.0)
        if not isinstance(s.share, (int, float)) or s.share > CONSTANT:
            noise = clip(NOISE - ratio, 0.0, 1.0) * at_most(smaller, 1.0)
            settled = multiply_add(longer, FORGET, noise * (SETTLE / self.steps))
            less = less + where(s.share > CONSTANT, settled, 0.0)
        begun = self.weights > _FORGOTTEN / (1.0 - s.momentum)
        most = clip(multiply_add(log(at_least(smaller, TINY)), 0.5, VANISHED), 0.0, LONGEST)
        most = where(squares > FADED * self.squares, most, self.growth)
        growth = at_least(at_most(self.growth - less, most), -LONGEST)
        growth = where(begun & moves, growth, self.growth)
        return type(self)(self.squares, self.weights, self.noise, growth, self.mean, self.steps)

    def longer(self, smaller: Scalar, share: Scalar = 1.0) -> Scalar:
        """How much longer steps are than R a, or shorter: e^h f.

        Args:
            smaller: What `smaller` returns.
            share: The rate of this step over the largest so far.
        """
        most = at_least(share, SHORTEST)
        f = clip(smaller, SHORTEST**2, most * most) ** 0.5
        if not isinstance(most, (int, float)) or most != 1.0:  # a constant rate costs nothing
            f = f / most
        return exp(self.growth) * where(self.steps > BEGINNING, f, 1.0)

    def over_noise(self, ahead: Scalar, squares: Scalar, s: Settings) -> Scalar:
        """‖Σ bⱼ Gⱼ‖² / Σ bⱼ² ‖Gⱼ‖²: about 1 if late gradients have nothing in common.

        Args:
            ahead: The norm of Σ bⱼ Gⱼ, which is what `averaged` returns of gradients.
            squares: ‖∇W‖² of this step.
            s: The settings.
        """
        noise, alpha = self.noise, s.momentum
        if s.nesterov:
            noise = multiply_add(noise, alpha * alpha, squares * (1.0 + 2.0 * alpha))
        return ahead * ahead / at_least(noise, TINY)

    def agreement(self, ahead: Scalar, squares: Scalar, s: Settings) -> Scalar:
        """‖Σ bⱼ Gⱼ‖ / √(Σ bⱼ · Σ bⱼ ‖Gⱼ‖²), in [0, 1]: 1 if all late gradients are equal.

        Args:
            ahead: The norm of Σ bⱼ Gⱼ, which is what `averaged` returns of gradients.
            squares: ‖∇W‖² of this step.
            s: The settings.
        """
        squared, weights = self.squares, self.weights
        if s.nesterov:
            squared, weights = self._added(squares, s)
        return at_most(ahead / at_least(squared * weights, TINY) ** 0.5, 1.0)


def _pair(old: Array, one: Scalar, two: Scalar) -> Array:
    """Two numbers along a last axis, as an array like the one that they came from."""
    xp = namespace(old)
    if isinstance(one, (int, float)) and isinstance(two, (int, float)):
        return xp.asarray([one, two], dtype=old.dtype, device=device(old))
    like = old[..., 0]
    return xp.stack([cast(as_array(x, like), old) for x in (one, two)], axis=-1)
