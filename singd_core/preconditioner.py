"""The factors of one layer, or of a stack of equal ones: which they are, and how they start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from singd_core._array import Array, namespace
from singd_core._settings import Settings
from singd_core.structures import Dense, Diagonal, Structure, blockdiagonal, get
from singd_core.updates.curvature import Averages
from singd_core.updates.inverse_free import InverseFree
from singd_core.updates.kfac import KFAC
from singd_core.updates.levels import Levels
from singd_core.updates.shampoo import Shampoo

DEFAULT = "cost:512"

# Numbers that any factor may hold; operations that the products of any layer may take; the widest
# and narrowest blocks.
_SMALL = 1 << 16
_FREE = 1 << 22
_WIDEST = 1024
_NARROWEST = 8

Factors: TypeAlias = InverseFree | KFAC
Structures: TypeAlias = str | type[Structure] | Sequence[str | type[Structure]]
Shape: TypeAlias = tuple[Sequence[int], int, int]  # batch axes, d_out, d_in


def resolve(
    structures: Structures | None, shape: Shape = ((), 1, 1), *, kfac: bool
) -> tuple[type[Structure], type[Structure]]:
    """The structures of K and C of one layer.

    Args:
        structures: Two names or classes, or one for both; `"auto:b"` for the richest of at most b
            numbers a row; `"cost:n"` for the richest that cost little beside n rows a step; or None
            for `"cost:512"`.
        shape: The batch axes, d_out and d_in; names do not ask for it.
        kfac: Whether they have to be dense.

    Raises:
        ValueError: If a name is unknown, or not dense for KFAC.
    """
    batch, d_out, d_in = shape
    if kfac and structures is None:
        return Dense, Dense
    if structures is None:
        structures = DEFAULT
    kind, _, count = structures.partition(":") if isinstance(structures, str) else ("", "", "")
    if kind in ("auto", "cost"):
        if kfac:
            raise ValueError(
                f'structures="{structures}": KFAC inverts dense factors; choose "dense"'
            )
        if not count.isdecimal() or int(count) < 1:
            wanted = {
                "auto": '"auto:b" wants b >= 1 numbers a row',
                "cost": '"cost:n" wants n >= 1',
            }
            raise ValueError(f'structures="{structures}": {wanted[kind]}')
        if 0 in (d_out, d_in):
            return Dense, Dense
        if kind == "cost":
            return by_cost(d_out, d_in, int(count), math.prod(batch))
        return within(d_in, int(count)), within(d_out, int(count))
    both = isinstance(structures, (str, type))
    pair = (structures, structures) if both else structures
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"structures={structures!r}: give two, one for K and one for C, or one for both"
        )
    found = []
    for i, name in enumerate(pair):
        which = "structures" if both else f"structures[{i}]"
        try:
            found.append(get(name))
        except ValueError as error:
            raise ValueError(f"{which} = {error}") from None
        if kfac and found[i] is not Dense:
            raise ValueError(
                f'{which} = "{found[i].name}": KFAC inverts dense factors; choose "dense", '
                "or the inverse-free update (kfac=False)"
            )
    if 0 in (d_out, d_in):  # there is nothing to learn, and not every structure has a side of 0
        return Dense, Dense
    return found[0], found[1]


def by_cost(
    d_out: int, d_in: int, n: int, stack: int = 1
) -> tuple[type[Structure], type[Structure]]:
    """The richest structures of K and C that cost little in a step with n rows.

    With blocks of sides w_K and w_C the two products of a step are 2 (w_K + w_C) d_out d_in
    operations, where n rows take 6 n d_out d_in forward and backward: a tenth of them is spent. A
    layer that is small may take 2^23 operations (a tenth of a millisecond), and no factor holds
    more numbers than the weight, or than a small layer's. A stack of matrices is one layer.
    """
    numbers = max(d_out * d_in, _SMALL // max(1, stack))
    sides = min(0.3 * n, _WIDEST) if d_out * d_in else 0.0
    total = max(sides, min(256, _FREE // max(1, stack * d_out * d_in)))
    most = [min(d, numbers // max(1, d), _WIDEST) for d in (d_in, d_out)]
    w = [min(m, total / 2) for m in most]
    w = [min(most[0], total - w[1]), min(most[1], total - w[0])]
    return fitted(d_in, int(w[0]), (d_in, d_in - 1)), fitted(d_out, int(w[1]), (d_out,))


def fitted(d: int, w: int, wholes: Sequence[int]) -> type[Structure]:
    """The richest structure of side d with blocks of at most w: dense, blocks, or diagonal.

    Blocks divide one of the `wholes` if they can without being less than half as large: the side,
    or the side without the column of a bias.
    """
    if d <= w:
        return Dense
    if w < _NARROWEST:
        return Diagonal
    sizes = range(max(_NARROWEST, w // 2), w + 1)
    even = [b for b in sizes if any(whole % b == 0 for whole in wholes)]
    return blockdiagonal(max(even, default=w))


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
