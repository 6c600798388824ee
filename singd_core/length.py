"""How long a step is: the norms that it has, and longer where late gradients agree.

Section 5 of docs/mathematics.md has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from singd_core._array import Scalar, norm
from singd_core._scalars import at_least, number, where
from singd_core._settings import StepSettings
from singd_core.curvature import TINY
from singd_core.late import Late

# The size of a step is the geometric mean of two sizes. With the first, the spectral norm of the
# layer's step is about 2.26 lr. With the second, the layer's outputs change by a root mean square
# of 1.5 lr.
SPECTRAL = 2.26
OUTPUTS = 1.5

# The mean diagonal of U where no rows tell it: a little less than that of normalized inputs.
TYPICAL = 0.7

# A natural gradient whose norm is smaller makes a smaller step: squares in float32 have lost their
# digits, or are zero. It is the root of the smallest normal number.
LEAST = 2.0**-63


class Sized(NamedTuple):
    """A natural gradient n, and how far it moves the weights: W ← W − lr c n.

    Attributes:
        natural: n.
        scale: c.
        length: The norm of n.
        late: The new sums over late gradients, None without momentum.
        agreement: How much they agree.
    """

    natural: Any
    scale: Scalar
    length: Scalar
    late: Late | None
    agreement: Scalar


def sized(
    s: StepSettings,
    ahead: Any,
    precondition: Callable[[Any], Any],
    size: Scalar,
    squares: Scalar,
    late: Late | None,
) -> Sized:
    """The natural gradient of an average of gradients, and how far it moves the weights.

    `ahead` and n may be lists of matrices, of a type that has a kernel for norms. Each number is
    of one matrix, or a vector has the numbers of many.

    Args:
        s: The settings.
        ahead: The average of gradients, which `precondition` may overwrite.
        precondition: Makes n of it.
        size: What `size` returns.
        squares: ‖∇W‖².
        late: The sums over late gradients, or None without momentum.
    """
    length = number(norm(ahead))
    natural = precondition(ahead)
    lengths = length, number(norm(natural))
    scale, late, agreement = scaled(s, size, squares, lengths, late)
    return Sized(natural, scale, lengths[1], late, agreement)


def scaled(
    s: StepSettings,
    size: Scalar,
    squares: Scalar,
    lengths: tuple[Scalar, Scalar],
    late: Late | None,
) -> tuple[Scalar, Late | None, Scalar]:
    """How much a step of rate 1 multiplies the natural gradient by: c of W ← W − lr c n.

    Each number is of one matrix, or an array has the numbers of many.

    Args:
        s: The settings.
        size: What `size` returns.
        squares: ‖∇W‖².
        lengths: The norms of the average of gradients and of its natural gradient n.
        late: The sums over late gradients, or None without momentum.

    Returns:
        c, the new sums, and how much the late gradients agree.
    """
    agreement: Scalar = 1.0
    longer: Scalar = 1.0
    ahead, natural = lengths
    moves = squares > 0.0
    if late is not None:
        late = late.update(squares, s)
        agreement = late.agreement(ahead, squares, s)
        ratio, smaller = late.over_noise(ahead, squares, s), late.smaller()
        late = late.grown(ratio, smaller, squares, moves, s)
        longer = late.longer(smaller, s.share)
    scale = longer * (agreement * size) / at_least(natural, LEAST)
    return where(moves, scale, 0.0), late, agreement


def sides(d_out: int, d_in: int, overlap: float) -> tuple[float, float]:
    """The Frobenius norms of a step of rate 1 that is sized by its spectral norm, and by outputs.

    These are R √(d_out d_in) with R_spectral = 2.26 / √(overlap max(d_out, d_in)), and with
    R_outputs = 1.5 / √(d_in t_U) where the mean diagonal t_U of U is 1.
    """
    return SPECTRAL * math.sqrt(min(d_out, d_in) / overlap), OUTPUTS * math.sqrt(d_out)


def size(sides: tuple[Scalar, Scalar], t_U: Scalar, depth: float = 1.0) -> Scalar:
    """R √(d_out d_in), the Frobenius norm of a step of rate 1 if all late gradients are equal.

    R = √(R_spectral R_outputs) (5.10), times the `depth` of (5.10b). The mean diagonal t_U of U is
    0 where it is not known, and taken for `TYPICAL` then.
    """
    spectral, outputs = sides
    found = (spectral * outputs * where(t_U > TINY, t_U, TYPICAL) ** -0.5) ** 0.5
    return found if depth == 1.0 else depth * found
