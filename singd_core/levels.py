"""How large the rows and columns of a natural gradient are, and what makes them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeVar

from singd_core._array import (
    Array,
    Scalar,
    cast,
    expand,
    is_traced,
    multiply_add,
    namespace,
    wide_full,
    widen,
)
from singd_core._scalars import at_least, number, where
from singd_core._settings import Rate
from singd_core._tree import Tree, tree
from singd_core.curvature import TINY

T_Factors = TypeVar("T_Factors", bound=Any)

# A row or column without entries is taken for one of this share of the mean square.
FLOOR = 0.1
EVEN = 1.0 - FLOOR  # the level of what is multiplied by 1

# Matrices of more numbers are squared in so many parts.
_WHOLE = 1 << 16
_PARTS = 8


@tree
class Levels(Tree):
    """Mean squares of the rows and columns of the balanced natural gradient, with mean 1.

    Balanced entries have equal variance if gradients have the covariance of the curvature. Their
    mean, which is what trains, differs from row to row: a step multiplies rows and columns by
    (level + 0.1)^(−½) (docs/mathematics.md, section 5).

    Attributes:
        rows: Shape (..., d_out), with mean 1.
        columns: Shape (..., d_in), with mean 1.
    """

    rows: Array
    columns: Array

    @classmethod
    def even(cls, batch: Sequence[int], d_out: int, d_in: int, like: Array) -> Self:
        """Before anything is measured, on the device of `like`."""
        return cls(*(wide_full((*batch, d), 1.0, like=like) for d in (d_out, d_in)))

    @property
    def sides(self) -> tuple[Array, Array]:
        """The levels of the columns and of the rows: the sides of K and of C."""
        return self.columns, self.rows

    def scales(self) -> list[Array]:
        """What the columns and the rows are multiplied by."""
        return [scale(level) for level in self.sides]

    def measured(self, natural: Array, weight: Scalar) -> Self:
        """With the levels of a natural gradient that these scales have multiplied.

        Args:
            natural: n, shape (..., d_out, d_in), times any number for each matrix.
            weight: How much it counts, in [0, 1]; a matrix of zeros does not.
        """
        return self.updated(*sums(natural, self.rows + FLOOR, self.columns + FLOOR), weight)

    def updated(self, rows: Array, columns: Array, weight: Scalar) -> Self:
        """With the levels of a natural gradient, from its `sums`.

        Args:
            rows: The sums of the rows, with the columns' levels + 0.1 as weights.
            columns: The sums of the columns, with the rows' levels + 0.1 as weights.
            weight: As for `measured`.
        """
        rows, columns = rows * (self.rows + FLOOR), columns * (self.columns + FLOOR)
        total = number(namespace(rows).sum(rows, axis=-1))  # of the columns too
        of_new, of_old = multipliers(total, weight)
        pairs = (self.rows, rows), (self.columns, columns)
        return type(self)(
            *(
                multiply_add(new * expand(of_new, new), old.shape[-1], old * expand(of_old, old))
                for old, new in pairs
            )
        )


def multipliers(total: Scalar, weight: Scalar) -> tuple[Scalar, Scalar]:
    """What new sums are multiplied by, of as many rows or columns, and what old levels are.

    The share of new sums may be near the end of the range: it multiplies them first.

    Args:
        total: The sum of all squares. A sum of zeros does not count.
        weight: How much the new ones count.
    """
    weight = where(total > TINY, weight + 0.0 * total, 0.0)
    return weight / at_least(total, TINY), 1.0 - weight


def scale(level: Array) -> Array:
    """What a row or column of this level is multiplied by."""
    return (level + FLOOR) ** -0.5


def leveled(factors: T_Factors, natural: Array, lr_cov: Rate) -> T_Factors:
    """The factors with the levels of a natural gradient, averaged at the rate `lr_cov`.

    A step measures them if the next one refreshes the factors: what preconditions is made anew
    then. The first one after a refresh counts in full, and none before.
    """
    levels = factors.levels
    if levels is None:
        return factors
    weight = weight_of(number(factors.averages.k), lr_cov)
    return dataclasses.replace(factors, levels=levels.measured(natural, weight))


def weight_of(k: Scalar, lr_cov: Rate) -> Scalar:
    """How much a measurement counts after k refreshes."""
    return where(k > 0.0, at_least(1.0 / at_least(k, 1.0), lr_cov), 0.0)


def sums(
    n: Array, of_rows: Array, of_columns: Array, parts: int | None = None
) -> tuple[Array, Array]:
    """The sums over columns of n² times their weights, and over rows, in `parts` of the rows."""
    xp, d_out = namespace(n), n.shape[-2]
    if is_traced(n):  # a compiler makes the squares where it adds them
        squares = widen(n) * widen(n)
        return (
            xp.sum(squares * of_columns[..., None, :], axis=-1),
            xp.sum(squares * of_rows[..., None], axis=-2),
        )
    if parts is None:
        parts = 1 if n.shape[-1] * d_out <= _WHOLE else _PARTS
    step = -(-d_out // parts)
    rows, columns = [], None
    for start in range(0, max(1, d_out), max(1, step)):
        some = slice(start, start + step)
        part = cast(widen(n[..., some, :]), of_rows)
        squares = part * part
        rows.append((squares @ of_columns[..., None])[..., 0])
        sums = (of_rows[..., None, some] @ squares)[..., 0, :]
        columns = sums if columns is None else columns + sums
    return rows[0] if len(rows) == 1 else xp.concat(rows, axis=-1), columns
