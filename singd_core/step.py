"""How a weight moves: momentum, natural gradient, the size of the step, decay.

The equations are in docs/mathematics.md, section 5. Matrices have shape (..., d_out, d_in):
leading axes are matrices of their own. Parameters, gradients and momenta have their own shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from singd_core._array import (
    Array,
    Scalar,
    cast,
    empty,
    expand,
    is_inexact,
    is_view,
    multiply_add,
    namespace,
    norm,
    sum_of_squares,
    total,
    widen,
)
from singd_core._scalars import at_least, at_most, number, where
from singd_core._settings import Settings, StepSettings, is_zero
from singd_core.curvature import TINY
from singd_core.late import Late
from singd_core.layers import LayerKind
from singd_core.length import sides, size, sized
from singd_core.rounding import WHOLE, Place, Rounding

# So many matrices take steps of full size. More share what these change together.
FEW = 12

# The step after which arrays of 32 bits count from the middle on.
_LAST = 2**30

Parts: TypeAlias = Sequence[Array]  # a weight, or a weight and its bias; or their gradients


class Direction(NamedTuple):
    """Where a layer goes: W ← W − lr c u (− lr γ W).

    Attributes:
        parts: u of the weight and of its bias.
        scale: c, a number, or an array with the first axes of u if it is a stack.
        finite: Whether all that made them is finite, a bool or 0-d.
        momenta: The new momenta, None without.
        late: The new sums over late gradients, arrays or `numbers`; None without.
        agreement: How much they agree, a number or of the batch axes' shape.
        natural: The natural gradient, times any number for each matrix; None if not `normalized`.
        of_bias: The scale of the bias, None if it is c.
    """

    parts: Parts
    scale: Scalar
    finite: Array | bool
    momenta: Parts | None
    late: Late | None
    agreement: Scalar = 1.0
    natural: Array | None = None
    of_bias: Scalar | None = None

    @property
    def scales(self) -> tuple[Scalar, Scalar]:
        """What the weight's and the bias's part are multiplied by."""
        return self.scale, self.scale if self.of_bias is None else self.of_bias


def direction(
    kind: LayerKind,
    s: StepSettings,
    precondition: Callable[[Array], Array],
    t_U: Scalar,
    shape: Sequence[int],
    gradient: Parts,
    decay: Parts | None,
    momenta: Parts | None,
    late: Late | None,
    squares: Scalar,
    *,
    donate: bool = False,
) -> Direction:
    """The direction of a layer, or of a stack of equal ones along a first axis.

    Args:
        kind: How the parameters are a matrix.
        s: The settings.
        precondition: Makes n of ∇W; it may overwrite ∇W if `donate`.
        t_U: The mean diagonal of U, of the batch axes' shape; 0 where it is not known.
        shape: The shape of the weight of one layer.
        gradient: The gradients of weight and bias.
        decay: γ W of both if `couples_decay(s)`, else None.
        momenta: The momenta of both, or None without momentum.
        late: The sums over late gradients, or None without momentum.
        squares: ‖∇W‖², of the batch axes' shape.
        donate: Whether the momenta may be overwritten, where arrays can be.
    """
    bias = len(gradient) > 1
    if not s.normalized:  # an average of natural gradients
        natural = precondition(kind.matrix(*gradient))
        own: Parts = [part for part in kind.split(natural, shape, bias) if part is not None]
        finite = is_finite(norm(natural))
        if finite is False:  # before a momentum is overwritten
            return Direction(own, 0.0, finite, momenta, late)
        own, momenta = averages(plus(own, decay), momenta, s, donate=donate)
        return Direction(own, 1.0, finite, momenta, late)

    if decay is not None:
        gradient = plus(gradient, decay)
        squares = squares_of(kind, gradient)
    matrix, momenta = joined(kind, s, shape, gradient, momenta, donate=donate)
    groups, d_out, d_in = kind.shape(shape, bias)
    own = size(sides(d_out, d_in, kind.overlap), number(t_U), s.depth), number(squares)
    sums = None if late is None else late.numbers()
    natural, scale, length, sums, agreement = sized(s, matrix, precondition, *own, sums)
    if groups:  # a weight is several matrices
        natural, scale = times(scale, natural, in_place=donate), 1.0
    parts = [part for part in kind.split(natural, shape, bias) if part is not None]
    return Direction(parts, scale, is_finite(length), momenta, sums, agreement, natural)


def averaged(
    x: Array, momentum: Array | None, s: Settings, *, donate: bool = False, out: Array | None = None
) -> tuple[Array, Array | None]:
    """The average u, and the momentum m ← α₂ m + x;  u = m, or x + α₂ m (Nesterov).

    Args:
        x: What is averaged, of the shape of m.
        momentum: m, or None without momentum: then u = x.
        s: The settings.
        donate: Whether m may be overwritten, where arrays can be.
        out: Where u is to be written, or None.
    """
    if momentum is None:
        return x, None
    x, alpha = cast(x, momentum), expand(s.momentum, momentum)
    momentum = multiply_add(momentum, alpha, x, out=momentum if donate else None)
    if s.nesterov:
        return multiply_add(momentum, alpha, x, out=out), momentum
    return (momentum if out is None else multiply_add(momentum, 0.0, momentum, out=out)), momentum


def weight_change(
    u: Array, c: Scalar, weight: Array, s: Settings, onto: Array | None = None
) -> Array:
    """−lr c u, and −lr γ W for a decoupled decay, in the dtype of W, added `onto` an array."""
    c = -1.0 * s.lr * c
    if u.dtype != weight.dtype:  # float16 has no room for u, nor for c
        u, c = cast(u * expand(c, u), weight), 1.0
    if decouples_decay(s):
        onto = _scaled(weight, -1.0 * s.lr * s.weight_decay, onto)
    return _scaled(u, c, onto)


def new_weight(
    u: Array,
    c: Scalar,
    weight: Array,
    s: Settings,
    rounding: Rounding,
    name: str = "weight",
    place: Place = WHOLE,
    cost: Array | None = None,
) -> tuple[Array, Array | None]:
    """A weight of 16 bits after its step, in float32 with numbers that it can hold.

    Args:
        u: The direction.
        c: Its scale.
        weight: The weight.
        s: The settings.
        rounding: How it is stored.
        name: Under which name.
        place: Where it stands in the whole weight.
        cost: What rounding has cost it in earlier steps, or None.

    Returns:
        The new weight, and what rounding has cost it by now, None unless that is kept.
    """
    wide = widen(weight)  # of its own
    return rounding.stored(weight_change(cast(u, wide), c, wide, s, wide), name, place, cost)


def squares_of(kind: LayerKind, gradient: Parts) -> Array:
    """‖∇W‖² of each matrix, of the batch axes' shape, in at least float32."""
    return sum_of_squares(kind.matrix(*gradient), 2)


def times(c: Scalar, x: Array, *, in_place: bool) -> Array:
    """The product c x, for a number or an array of the batch axes' shape."""
    if not in_place:
        return x * expand(c, x)
    x *= expand(c, x)
    return x


def has_momentum(s: Settings) -> bool:
    """Whether the weights have a momentum: an array is one, whose value nobody can wait for."""
    return not is_zero(s.momentum)


def couples_decay(s: Settings) -> bool:
    """Whether the weight decay goes through the momentum."""
    return not s.decoupled_weight_decay and not is_zero(s.weight_decay)


def decouples_decay(s: Settings) -> bool:
    """Whether the weight decay shrinks the weights by themselves."""
    return s.decoupled_weight_decay and not is_zero(s.weight_decay)


def warmed(s: Settings, step: Scalar) -> Scalar:
    """The share of the rates in a step, counted from 0: it grows to 1 in `warmup` steps."""
    return 1.0 if s.warmup == 0 else at_most((step + 1) / s.warmup, 1.0)


def next_step(step: Scalar) -> Scalar:
    """The number of the step after this one.

    An array of 32 bits has no larger numbers than 2^31 − 1: at 2^30 it goes back to 2^29. What
    depends on the number, the refreshes and the random bits, begins there again.
    """
    if isinstance(step, int):
        return step + 1
    xp = namespace(step)
    if not xp.isdtype(step.dtype, xp.int32):
        return step + 1
    return where(step < _LAST - 1, step + 1, _LAST // 2)


def largest_rate(largest: Scalar, lr: Scalar) -> Scalar:
    """The largest rate so far, with the rate of one more step; one that is not finite is none.

    A step with such a rate changes nothing, and later steps do not know of it.
    """
    lr = number(lr)
    if isinstance(lr, (int, float)):
        return at_least(largest, lr if lr < math.inf else 0.0)
    if not is_inexact(lr):  # a schedule of integers may be followed by one of fractions
        lr = namespace(lr).astype(lr, namespace(lr).float32)
    lr = widen(lr)  # 16 bits would round it
    return at_least(largest, where(namespace(lr).isfinite(lr), lr, 0.0))


def share_of(lr: Scalar, largest: Scalar) -> Scalar:
    """A rate over the largest so far."""
    return at_most(number(lr) / at_least(number(largest), TINY), 1.0)


def of_step(s: Settings, step: Scalar, largest_lr: Scalar, matrices: int) -> StepSettings:
    """With the warm-up (5.13), and a momentum that forgets faster where rates have decayed (5.8b).

    Args:
        s: The settings, with the rate of the step before any warm-up.
        step: The number of steps taken.
        largest_lr: The largest such rate so far, of this step included.
        matrices: The number of weight matrices that are trained, for (5.10b).
    """
    share = share_of(s.lr, largest_lr)
    alpha = s.momentum
    if s.normalized and not is_zero(alpha):
        alpha = alpha ** (2.0 - share)
    warm = warmed(s, step)
    changed = {"lr": s.lr * warm, "momentum": alpha, "share": share, "warm": warm}
    return StepSettings(**vars(s) | changed, depth=min(1.0, FEW / max(1, matrices)))


def joined(
    kind: LayerKind,
    s: Settings,
    shape: Sequence[int],
    gradient: Parts,
    momenta: Parts | None,
    *,
    donate: bool,
    owned: bool = False,
) -> tuple[Array, Parts | None]:
    """The average of gradients as a matrix, and the new momenta.

    If `donate`, the average is written where it is joined, or in the place of an `owned` gradient.
    """
    bias = len(gradient) > 1
    room = outs = None
    pairs = zip(gradient, momenta or (), strict=False)
    if donate and owned and momenta and all(x.dtype == m.dtype for x, m in pairs):
        outs = gradient
    elif donate and momenta is not None:
        stack = gradient[0].shape[: gradient[0].ndim - len(shape)]
        batch, d_out, d_in = kind.shape(shape, bias)
        room = empty((*stack, *batch, d_out, d_in), like=momenta[0])
    if room is not None:
        outs = [r for r in kind.split(room, shape, bias) if r is not None]
        if not all(is_view(r, room) for r in outs):  # of a kind that splits into copies
            room = outs = None
    ahead, momenta = averages(gradient, momenta, s, donate=donate, outs=outs)
    written = outs is not None and all(a is out for a, out in zip(ahead, outs, strict=True))
    if room is not None and written:
        return room, momenta
    return kind.matrix(*ahead), momenta  # a rate may make arrays of another type


def averages(
    xs: Parts, momenta: Parts | None, s: Settings, *, donate: bool, outs: Any = None
) -> tuple[Parts, Parts | None]:
    """`averaged` of a weight and its bias, written to `outs` if given."""
    if momenta is None:
        return xs, None
    outs = (None,) * len(xs) if outs is None else outs
    pairs = [
        averaged(x, m, s, donate=donate, out=out)
        for x, m, out in zip(xs, momenta, outs, strict=True)
    ]
    return [u for u, _ in pairs], [m for _, m in pairs]


def plus(xs: Parts, decay: Parts | None) -> Parts:
    """The gradients with what a decay adds to them."""
    return xs if decay is None else [x + cast(w, x) for x, w in zip(xs, decay, strict=True)]


def is_finite(x: Scalar) -> Array | bool:
    """Whether a number, or all entries of a small array, are finite."""
    x = x if isinstance(x, (int, float)) else number(total(x))
    return math.isfinite(x) if isinstance(x, (int, float)) else namespace(x).isfinite(x)


def _scaled(x: Array, c: Scalar, y: Array | None) -> Array:
    c = expand(c, x)
    return x * c if y is None else multiply_add(x, c, y, out=y)
