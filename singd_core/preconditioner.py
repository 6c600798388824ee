"""The factors of one layer, or of a stack of equal ones: which they are, and how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from singd_core._array import Array
from singd_core.settings import Settings
from singd_core.structures import Dense, Structure, get
from singd_core.updates.curvature import Averages
from singd_core.updates.inverse_free import InverseFree
from singd_core.updates.kfac import KFAC

Factors: TypeAlias = InverseFree | KFAC
Structures: TypeAlias = Sequence[str | type[Structure]]


def resolve(structures: Structures, *, kfac: bool) -> tuple[type[Structure], type[Structure]]:
    """The structures of K and C from their names.

    Raises:
        ValueError: If they are not two known names, or not dense for KFAC.
    """
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


def init(
    structures: tuple[type[Structure], type[Structure]],
    shape: tuple[Sequence[int], int, int],
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
    K = structures[0].identity(d_in, like=like_K, batch=batch)
    C = structures[1].identity(d_out, like=like_C, batch=batch)
    averages = Averages.zeros(batch, like_K)
    if settings.kfac:
        return KFAC(K, C, K, C, averages)  # type: ignore[arg-type]
    if settings.kfac_like or (isinstance(settings.alpha1, (int, float)) and settings.alpha1 == 0.0):
        return InverseFree(K, C, None, None, averages)
    return InverseFree(K, C, K.scale(0.0), C.scale(0.0), averages)
