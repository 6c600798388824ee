"""How factors learn: from rows without inverses, from gradients alone, or as KFAC does."""

from __future__ import annotations

from typing import TypeAlias

from singd_core._array import Array, namespace
from singd_core._settings import Settings
from singd_core.curvature import Averages
from singd_core.levels import Levels
from singd_core.rules.inverse_free import InverseFree
from singd_core.rules.kfac import KFAC
from singd_core.rules.shampoo import Shampoo
from singd_core.structures.base import Structure
from singd_core.structures.choose import MatrixShape

Factors: TypeAlias = InverseFree | KFAC


def start(
    structures: tuple[type[Structure], type[Structure]],
    shape: MatrixShape,
    settings: Settings,
    like_K: Array,
    like_C: Array,
    *,
    has_rows: bool = True,
    one_hot: bool = False,
) -> Factors:
    """The factors before the first refresh: the identity.

    Args:
        structures: The structure of K and the structure of C.
        shape: The batch axes, d_out and d_in.
        settings: Decides for KFAC or the inverse-free update.
        like_K: Any array with the dtype and device of K.
        like_C: Any array with the dtype and device of C.
        has_rows: Whether they will be refreshed by rows, or else by gradients.
        one_hot: Whether the inputs are one-hot: most columns of a gradient are then zero in most
            steps, and their levels tell nothing.

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
    averages = Averages.zeros(batch, like_K)
    levels = None
    if settings.normalized and not one_hot:
        levels = Levels.even(batch, d_out, d_in, like_C)
    if settings.kfac:
        return KFAC(K, C, K, C, averages, levels)  # type: ignore[arg-type]
    update = InverseFree if has_rows else Shampoo
    if settings.kfac_like or (isinstance(settings.alpha1, (int, float)) and settings.alpha1 == 0.0):
        return update(K, C, None, None, averages, levels)
    m_K, m_C = (L.map(namespace(L.like).zeros_like) for L in (K, C))
    return update(K, C, m_K, m_C, averages, levels)
