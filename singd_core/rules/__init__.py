"""How factors learn: from rows without inverses, from gradients alone, or as KFAC does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from singd_core._array import Array
from singd_core._settings import Settings
from singd_core._tree import tree as rule
from singd_core.curvature import Averages
from singd_core.levels import Levels
from singd_core.rules.base import Rule
from singd_core.rules.centering import InputMean
from singd_core.rules.inverse_free import IKFAC, SINGD, InverseFree
from singd_core.rules.kfac import KFAC
from singd_core.rules.registry import get, names, register
from singd_core.rules.shampoo import Shampoo
from singd_core.structures.base import Structure
from singd_core.structures.choose import MatrixShape

__all__ = [
    "BY_CHOICE",
    "IKFAC",
    "KFAC",
    "SINGD",
    "Factors",
    "InverseFree",
    "Rule",
    "Shampoo",
    "by_rows",
    "get",
    "inputs_of",
    "learns_from_gradients",
    "names",
    "register",
    "rule",
    "start",
    "wants_rows",
]

Factors: TypeAlias = Rule  # what a rule keeps of a layer
BY_CHOICE = "diagonal factors learn from gradients"  # why a layer has no rows, in tables


def learns_from_gradients(s: Settings) -> bool:
    """Whether matrices that show no rows have factors; else AdamW trains them."""
    return s.normalized and get(s.rule).without_rows


def wants_rows(s: Settings, structures: Sequence[type[Structure]]) -> bool:
    """Whether a layer that has rows learns from them under these settings, or from gradients."""
    return not learns_from_gradients(s) or get(s.rule).wants_rows(structures)


def start(
    structures: tuple[type[Structure], type[Structure]],
    shape: MatrixShape,
    settings: Settings,
    like_K: Array,
    like_C: Array,
    *,
    has_rows: bool = True,
    one_hot: bool = False,
    bias: bool = False,
) -> Factors:
    """The factors before the first refresh: the identity.

    Args:
        structures: The structure of K and the structure of C.
        shape: The batch axes, d_out and d_in.
        settings: Name the rule.
        like_K: Any array with the dtype and device of K.
        like_C: Any array with the dtype and device of C.
        has_rows: Whether they will be refreshed by rows, or else by gradients.
        one_hot: Whether the inputs are one-hot: most columns of a gradient are then zero in most
            steps, and their levels tell nothing.
        bias: Whether the weight has a bias that is no column of the matrix.

    Raises:
        ValueError: If a structure has no matrices of the side that is needed.
    """
    batch, d_out, d_in = shape
    for name, S, d in (("K", structures[0], d_in), ("C", structures[1], d_out)):
        if d > 0 and not S.has_side(d):
            raise ValueError(
                f'{name} has side {d}, and "{S.name}" has no such matrices: choose another '
                "structure for this layer (a bias makes the side of K one larger)"
            )
    # bfloat16 on NumPy and CuPy is promoted by Python numbers: cast what was computed back
    K = structures[0].identity(d_in, like=like_K, batch=batch).astype(like_K)
    C = structures[1].identity(d_out, like=like_C, batch=batch).astype(like_C)
    levels = None
    if settings.normalized and not one_hot:
        levels = Levels.even(batch, d_out, d_in, like_C)
    own = get(settings.rule)
    averages, momentum = Averages.zeros(batch, like_K), own.keeps_momentum(settings)
    if has_rows:
        return own.start(K, C, averages, levels, momentum)
    by_gradient = Shampoo.start(K, C, averages, levels, momentum)
    return by_gradient.with_bias() if bias else by_gradient


def inputs_of(factors: Factors) -> InputMean | None:
    """The mean of the inputs that a step is without, None for a step as it is."""
    return factors.inputs if isinstance(factors, Shampoo) else None


def by_rows(factors: Shampoo, s: Settings) -> Factors:
    """The same K and C for refreshes by rows, whose averages begin with the first."""
    own = get(s.rule)
    assert issubclass(own, InverseFree)
    averages = factors.averages.map(lambda a: a * 0.0)
    return own(factors.K, factors.C, factors.m_K, factors.m_C, averages, factors.levels)
