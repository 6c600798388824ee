"""Which structures the factors of a layer get: by name, by cost, or by numbers a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from singd_core.structures.base import Structure
from singd_core.structures.blockdiagonal import blockdiagonal
from singd_core.structures.dense import Dense
from singd_core.structures.diagonal import Diagonal
from singd_core.structures.registry import get

DEFAULT = "cost:512"

# Numbers that any factor may hold; operations that the products of any layer may take; the widest
# and narrowest blocks.
_SMALL = 1 << 16
_FREE = 1 << 22
_WIDEST = 1024
_NARROWEST = 8
# A factor that learns from gradients sees as many rows in a refresh as the other side is long, and
# remembers about twenty refreshes. It is no wider than the rows of this many refreshes.
_REMEMBERED = 16
# A layer to many outputs, such as the words of a language: more than four times as many as inputs,
# of which C would have more than eight blocks. Blocks are no better than a diagonal there.
_LONG = 4
_BLOCKS = 8
# From so many entries on, a table of bags has rare ones (docs/mathematics.md, section 5).
_RARE = 512

Structures: TypeAlias = str | type[Structure] | Sequence[str | type[Structure]]
MatrixShape: TypeAlias = tuple[Sequence[int], int, int]  # batch axes, d_out, d_in


def resolve(
    structures: Structures | None,
    shape: MatrixShape = ((), 1, 1),
    *,
    dense_for: str | None = None,
    diagonal: tuple[bool, bool] = (False, False),
    by_rows: bool = True,
    entries_of_bags: int = 0,
) -> tuple[type[Structure], type[Structure]]:
    """The structures of K and C of one layer.

    Args:
        structures: Two names or classes, or one for both; `"auto:b"` for the richest of at most b
            numbers a row; `"cost:n"` for the richest that cost little beside n rows a step; or None
            for `"cost:512"`.
        shape: The batch axes, d_out and d_in. Structures by name do not need it.
        dense_for: The name of a rule whose factors have to be dense, or None.
        diagonal: Which of the two measures one-hot rows. It is always diagonal.
        by_rows: Whether rows refresh the factors, and not gradients.
        entries_of_bags: How many entries a table of bags has, 0 for other layers.

    Raises:
        ValueError: If a name is unknown, or not dense where it has to be.
    """
    if is_by_cost(structures) and dense_for is None and entries_of_bags >= _RARE:
        structures = Diagonal
    K, C = _asked(structures, shape, dense_for, by_rows)
    if 0 in shape[1:]:  # there is nothing to learn, and not every structure has a side of 0
        K = C = Dense
    return Diagonal if diagonal[0] else K, Diagonal if diagonal[1] else C


def _asked(
    structures: Structures | None,
    shape: MatrixShape,
    dense_for: str | None,
    by_rows: bool,
) -> tuple[type[Structure], type[Structure]]:
    batch, d_out, d_in = shape
    if dense_for is not None and structures is None:
        return Dense, Dense
    if structures is None:
        structures = DEFAULT
    kind, _, count = structures.partition(":") if isinstance(structures, str) else ("", "", "")
    if kind in ("auto", "cost"):
        if dense_for is not None:
            raise ValueError(
                f'structures="{structures}": {dense_for} takes dense factors alone; choose "dense"'
            )
        if not count.isdecimal() or int(count) < 1:
            n, of = ("b", "numbers a row") if kind == "auto" else ("n", "rows a step")
            raise ValueError(f'structures="{structures}": "{kind}:{n}" wants {n} >= 1 {of}')
        if kind == "cost":
            return by_cost(d_out, d_in, int(count), math.prod(batch), by_rows=by_rows)
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
        if dense_for is not None and found[i] is not Dense:
            raise ValueError(
                f'{which} = "{found[i].name}": {dense_for} takes dense factors alone; choose '
                '"dense", or the inverse-free update (another rule)'
            )
    return found[0], found[1]


def is_by_cost(structures: Structures | None) -> bool:
    """Whether structures are chosen from the shape of each weight by what they cost."""
    return structures is None or (isinstance(structures, str) and structures.startswith("cost:"))


def by_cost(
    d_out: int,
    d_in: int,
    n: int,
    stack: int = 1,
    *,
    by_rows: bool = True,
) -> tuple[type[Structure], type[Structure]]:
    """The richest structures of K and C that cost little in a step with n rows.

    With blocks of sides w_K and w_C the two products of a step are 2 (w_K + w_C) d_out d_in
    operations. n rows take 6 n d_out d_in operations forward and backward: a tenth of these may be
    spent. A small layer may take 2^23 operations (a tenth of a millisecond). No factor holds more
    numbers than the weight, or than a factor of a small layer. A stack of matrices is one layer.

    Blocks of factors that learn from gradients are at most 16 times as wide as the other side is
    long. A layer to many outputs has a diagonal C, and K has blocks of both sides' widths.
    """
    numbers = max(d_out * d_in, _SMALL // max(1, stack))
    sides = min(0.3 * n, _WIDEST) if d_out * d_in else 0.0
    total = max(sides, min(256, _FREE // max(1, stack * d_out * d_in)))
    rows = (_WIDEST, _WIDEST) if by_rows else (_REMEMBERED * d_out, _REMEMBERED * d_in)
    pairs = zip((d_in, d_out), rows, strict=True)
    most = [min(d, numbers // max(1, d), _WIDEST, seen) for d, seen in pairs]
    w = _shared(total, most)
    if d_out > max(_LONG * d_in, _BLOCKS * w[1]):
        w = _shared(total, (most[0], 0))
    return fitted(d_in, int(w[0]), (d_in, d_in - 1)), fitted(d_out, int(w[1]), (d_out,))


def _shared(total: float, most: Sequence[float]) -> list[float]:
    """The widths of two sides, at most these, which have a total: half of it each if both can."""
    w = [min(m, total / 2) for m in most]
    return [min(most[0], total - w[1]), min(most[1], total - w[0])]


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
