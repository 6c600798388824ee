"""The factors of one layer, or of a stack of equal ones: which they are, and how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from singd_core._array import Array, namespace
from singd_core._settings import Settings
from singd_core.structures import Dense, Diagonal, Structure, blockdiagonal, get
from singd_core.updates.curvature import Averages
from singd_core.updates.inverse_free import InverseFree
from singd_core.updates.kfac import KFAC

Factors: TypeAlias = InverseFree | KFAC
Structures: TypeAlias = Sequence[str | type[Structure]]
Shape: TypeAlias = tuple[Sequence[int], int, int]  # batch axes, d_out, d_in


def resolve(
    structures: Structures | str | None, shape: Shape = ((), 1, 1), *, kfac: bool
) -> tuple[type[Structure], type[Structure]]:
    """The structures of K and C of one layer.

    Args:
        structures: Two names or classes; `"auto:b"` for the richest of at most b numbers a row; or
            None for the richest that hold no more numbers than the weight matrix.
        shape: The batch axes, d_out and d_in; two names do not ask for it.
        kfac: Whether they have to be dense.

    Raises:
        ValueError: If a name is unknown, or not dense for KFAC.
    """
    _, d_out, d_in = shape
    if kfac and structures is None:
        return Dense, Dense
    if structures is None:
        return within(d_in, d_out), within(d_out, d_in)
    if kfac and isinstance(structures, str):
        raise ValueError(f'structures="{structures}": KFAC inverts dense factors; choose "dense"')
    if isinstance(structures, str) and structures.startswith("auto:"):
        budget = structures.removeprefix("auto:")
        if not budget.isdecimal() or int(budget) < 1:
            raise ValueError(f'structures="{structures}": "auto:b" wants b >= 1 numbers a row')
        b = int(budget)
        return within(d_in, b), within(d_out, b)
    if isinstance(structures, str) or len(structures) != 2:
        raise ValueError(f"structures={structures!r}: give two, those of K and of C")
    found = []
    for i, name in enumerate(structures):
        try:
            found.append(get(name))
        except ValueError as error:
            raise ValueError(f"structures[{i}] = {error}") from None
        if kfac and found[i] is not Dense:
            raise ValueError(
                f'structures[{i}] = "{found[i].name}": KFAC inverts dense factors; choose "dense", '
                "or the inverse-free update (kfac=False)"
            )
    return found[0], found[1]


def within(d: int, b: int) -> type[Structure]:
    """The richest structure of side d with at most b numbers a row: dense, blocks, or diagonal.

    More than 16 blocks are left to the diagonal: an update costs as much as b rows of the batch.
    """
    if d <= b:
        return Dense
    return blockdiagonal(b) if b > 1 and d <= 16 * b else Diagonal


def init(
    structures: tuple[type[Structure], type[Structure]],
    shape: Shape,
    settings: Settings,
    like_K: Array,
    like_C: Array,
) -> Factors:
    """The factors before the first refresh: the identity.

    Args:
        structures: Those of K and C.
        shape: The batch axes, d_out and d_in.
        settings: Decides for KFAC or the inverse-free update.
        like_K: Any array with the dtype and device of K.
        like_C: Any array with the dtype and device of C.
    """
    batch, d_out, d_in = shape
    # bfloat16 on NumPy and CuPy is promoted by Python numbers: cast what was computed back
    K = structures[0].identity(d_in, like=like_K, batch=batch).astype(like_K)
    C = structures[1].identity(d_out, like=like_C, batch=batch).astype(like_C)
    averages = Averages.zeros(batch, like_K)
    if settings.kfac:
        return KFAC(K, C, K, C, averages)  # type: ignore[arg-type]
    if settings.kfac_like or (isinstance(settings.alpha1, (int, float)) and settings.alpha1 == 0.0):
        return InverseFree(K, C, None, None, averages)
    m_K, m_C = (L.map(namespace(L.like).zeros_like) for L in (K, C))
    return InverseFree(K, C, m_K, m_C, averages)
