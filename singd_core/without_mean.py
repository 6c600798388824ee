"""How a weight and its bias move that learn from gradients: without the mean of their inputs.

Section 6 of docs/mathematics.md has the equations. Shapes are as in `singd_core.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from singd_core._array import Array, Scalar, cast, empty, namespace, norm, sum_of_squares
from singd_core._scalars import number
from singd_core._settings import StepSettings
from singd_core.late import Late
from singd_core.layers import LayerKind
from singd_core.length import scaled, sides, size
from singd_core.rules.centering import InputMean
from singd_core.rules.shampoo import Shampoo
from singd_core.step import Direction, Parts, averaged, is_finite, joined, plus, times

# The size of the step of a bias, in shares of R of its weight.
OF_BIAS = 0.5


def without_mean(
    kind: LayerKind,
    s: StepSettings,
    precondition: Callable[[Array], Array],
    of_column: Callable[[Array], Array],
    inputs: InputMean,
    shape: Sequence[int],
    gradient: Parts,
    decay: Parts | None,
    momenta: Parts | None,
    late: Late | None,
    *,
    ratio: Scalar = 1.0,
    donate: bool = False,
) -> Direction:
    """`direction` of a weight W and its bias b, in steps of W and b' = b + W μ (6.1 and 6.4).

    Args:
        kind: As for `direction`.
        s: As for `direction`.
        precondition: As for `direction`.
        of_column: Makes P_C g, balanced, of the gradient g of the bias, shape (..., d_out, 1).
        inputs: The mean of the inputs.
        shape: As for `direction`.
        gradient: As for `direction`.
        decay: As for `direction`.
        momenta: As for `direction`.
        late: As for `direction`.
        ratio: The rate of the weight, in shares of the rate of the bias.
        donate: As for `direction`.
    """
    weight, bias = plus(gradient, decay)
    G = kind.matrix(weight)
    g = _column(bias, G)
    G = inputs.centered(G, g, empty(G.shape, like=G) if donate else None)
    squares = [number(sum_of_squares(x, 2)) for x in (G, g)]  # before it is overwritten
    own, _ = kind.split(G, shape, False)
    of_weight, of_bias = (None, None) if momenta is None else momenta
    alone = None if of_weight is None else [of_weight]
    matrix, kept = joined(kind, s, shape, [own], alone, donate=donate, owned=True)
    ahead, of_bias = averaged(bias, of_bias, s, donate=donate)
    ahead = _column(ahead, G)
    before = [number(norm(x)) for x in (matrix, ahead)]
    natural, column = precondition(matrix), of_column(ahead)
    lengths = [number(norm(x)) for x in (natural, column)]

    groups, d_out, d_in = kind.shape(shape, False)
    length = size(sides(d_out, d_in, kind.overlap), 0.0, s.depth)  # t_U is not known
    sizes = length, share_of_bias(d_in) * length
    sums = (None, None) if late is None else late.parted()
    each = zip(sizes, squares, zip(before, lengths, strict=True), sums, strict=True)
    (c, one, agreement), (c_bias, two, _) = (scaled(s, *numbers) for numbers in each)
    if late is not None and one is not None and two is not None:
        late = late.paired(one, two)
    step = times(c_bias, column, in_place=False)
    step = step - times(c * ratio, cast(inputs.along(natural), step), in_place=False)
    if groups:  # a weight is several matrices
        natural, c = times(c, natural, in_place=donate), 1.0
    u, _ = kind.split(natural, shape, False)
    parts = u, namespace(G).reshape(step, bias.shape)
    kept = None if kept is None or of_bias is None else [*kept, of_bias]
    finite = is_finite(lengths[0]) & is_finite(lengths[1])
    return Direction(parts, c, finite, kept, late, agreement, natural, 1.0)


def share_of_bias(d_in: int) -> float:
    """The norm of a bias's step of rate 1, in shares of the norm that its weight's step has."""
    return OF_BIAS / math.sqrt(max(1, d_in))


def learned(factors: Shampoo, kind: LayerKind, gradient: Parts, *given: Any) -> Shampoo:
    """The factors after a refresh with the gradients of weight and bias; `given` is the rest."""
    if factors.inputs is None:
        return factors.learned(kind.matrix(*gradient), None, *given)
    weight, bias = gradient
    G = kind.matrix(weight)
    return factors.learned(G, _column(bias, G), *given)


def _column(bias: Array, G: Array) -> Array:
    """What belongs to a bias as a column beside what belongs to its weight."""
    return namespace(G).reshape(bias, (*G.shape[:-1], 1))
