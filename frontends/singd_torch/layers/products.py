"""Products with stacks of matrices, and einsum: which rows each matrix sees."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from singd_torch.tensors import pieces

_MATMUL = torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm
_GROUPED = [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f]


# What may be one.
PRODUCTS = frozenset([torch.einsum, torch.baddbmm, Tensor.baddbmm, *_GROUPED, *_MATMUL])


class MatrixRows(NamedTuple):
    """What the rows of a matrix are made of.

    Attributes:
        part: The number of the matrix, None of the only one.
        x: Its inputs.
        g: The gradients at its outputs.
        kept: Which of these rows are there, or None for all.
        samples: How many samples they are of, or None where these have an axis of the input.
    """

    part: int | None
    x: Tensor
    g: Tensor
    kept: Tensor | None = None
    samples: int | None = None


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an input with a matrix, or with each matrix of a stack `(parts, ...)`.

    Attributes:
        x: The input.
        handed: The matrices, as they were handed to the function.
        contracts_last: Whether the product sums over their last axis, and not the one before.
        rows: Of an input, the gradient at the output, and how many rows a matrix wants: the rows
            of each matrix.
    """

    x: Tensor
    handed: Tensor
    contracts_last: bool
    rows: Callable[[Tensor, Tensor, int], Iterator[MatrixRows]]


def product(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_weight: Callable[[Any], bool],
) -> Product | None:
    """What product a call is, or None if it is none that is known."""
    if function is torch.einsum and not kwargs:
        equation, *given = args
        listed = len(given) == 1 and isinstance(given[0], (list, tuple))
        return _einsum(equation, given[0] if listed else given, is_weight)
    if function in (torch.baddbmm, Tensor.baddbmm) and len(args) == 3 and not kwargs:
        function, args = torch.bmm, args[1:]
    if function in _GROUPED and len(args) == 2 and is_weight(args[1]):
        offs, x, weight = kwargs.get("offs"), *args
        if offs is None and x.ndim == weight.ndim == 3:
            return Product(x, weight, False, _of_each)
        if offs is not None and x.ndim == 2 and weight.ndim == 3:
            return Product(x, weight, False, _Grouped(offs))
        return None
    if function in _MATMUL and len(args) == 2 and not kwargs:
        a, b = args
        if is_weight(b) and b.ndim == 3 and a.ndim > 1:
            return Product(a, b, False, _of_each)
        if is_weight(a) and a.ndim == 3 and b.ndim > 1:
            return Product(b, a, True, _of_each_column)
    return None


def _of_each(x: Tensor, g: Tensor, most: int) -> Iterator[MatrixRows]:
    """Of `(..., parts, n, d_in)`, or `(n, d_in)` that all see, and `(..., parts, n, d_out)`."""
    parts = g.shape[-3]
    for part in range(parts):
        if x.ndim == 2:
            own = x.expand(*g.shape[:-3], *x.shape)
        else:
            own = x[..., part if x.shape[-3] == parts else 0, :, :]
        yield MatrixRows(part, own, g[..., part, :, :])


def _of_each_column(x: Tensor, g: Tensor, most: int) -> Iterator[MatrixRows]:
    """Of `(..., parts, d_in, n)`, or `(d_in, n)` that all see, and `(..., parts, d_out, n)`."""
    return _of_each(x.mT, g.mT, most)


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """Groups of rows that end at the places `ends`, each for a matrix of its own."""

    ends: Tensor

    def __call__(self, x: Tensor, g: Tensor, most: int) -> Iterator[MatrixRows]:
        if pieces.on_host(x):
            ends = [0, *self.ends.tolist()]
            for part, (start, end) in enumerate(itertools.pairwise(ends)):
                yield MatrixRows(part, x[start:end], g[start:end])
            return
        # The host does not know how many there are, so `most` of each are taken at equal distances.
        most = min(most, len(x))
        last = self.ends.to(torch.int64)
        first = torch.cat([last.new_zeros(1), last[:-1]])
        sizes, j, zero = last - first, torch.arange(most, device=x.device), x.new_zeros(())
        shares = (sizes / most).clamp(min=1.0).sqrt().to(g.dtype)
        for part in range(len(last)):
            n = sizes[part]
            kept, at = j < n, first[part] + torch.where(n > most, j * n // most, j)
            at = at.clamp(max=len(x) - 1)
            own = torch.where(kept[:, None], x[at], zero)
            own_g = torch.where(kept[:, None], g[at], zero) * shares[part]
            yield MatrixRows(part, own, own_g, kept)


def _spelled(names: Sequence[str], axes: Sequence[int]) -> list[str]:
    """The letters of operands, of so many axes, and of the output: letters for what dots say.

    The axes that are dots in several operands are the same ones, from the last of them.
    """
    names = [own.replace(" ", "") for own in names]
    counts = [n - len(own.replace("...", "")) for n, own in zip(axes, names, strict=False)]
    free = [a for a in string.ascii_letters if all(a not in own for own in names)]
    letters = ["".join(reversed(free[: max(n, 0)])) for n in (*counts, max(counts))]
    return [own.replace("...", dots) for own, dots in zip(names, letters, strict=True)]


def _einsum(equation: Any, operands: Any, is_weight: Callable[[Any], bool]) -> Product | None:
    """A product of two operands, each letter once in each, that sums over one letter alone."""
    given, arrow, output = equation.partition("->") if isinstance(equation, str) else ("", "", "")
    names = given.split(",")
    if not arrow or len(names) != 2 or len(operands) != 2:
        return None
    *names, output = _spelled([*names, output], [getattr(one, "ndim", 0) for one in operands])
    which = [i for i, operand in enumerate(operands) if is_weight(operand)]
    if len(which) != 1 or any(len(set(own)) < len(own) for own in (*names, output)):
        return None
    weight, x = operands[which[0]], operands[1 - which[0]]
    of_weight, of_x = names[which[0]], names[1 - which[0]]
    if not isinstance(x, Tensor) or len(of_weight) not in (2, 3) or len(of_x) != x.ndim:
        return None
    part, first, last = of_weight[:-2], of_weight[-2], of_weight[-1]
    ins, outs = (last, first) if last in of_x else (first, last)
    rest = [a for a in of_x if a not in (ins, part)]
    fits = ins in of_x and ins not in output and outs in output and outs not in of_x
    if not fits or set(output) != {*rest, outs, *part}:
        return None
    of_each = dict(zip(of_weight, weight.shape, strict=True))
    sizes = {a: n for a, n in zip(of_x, x.shape, strict=True) if a in of_each}
    if sizes[ins] != of_each[ins] or any(n not in (1, of_each[a]) for a, n in sizes.items()):
        return None  # torch repeats an axis of size 1, and sums what is repeated here

    def rows(x: Tensor, g: Tensor, most: int) -> Iterator[MatrixRows]:
        shared = part not in of_x
        x = x.permute([of_x.index(a) for a in [*(() if shared else part), *rest, ins]])
        g = g.permute([output.index(a) for a in [*part, *rest, outs]])
        if not part:
            yield MatrixRows(None, x, g)
            return
        for i, own in enumerate(g):
            yield MatrixRows(i, x if shared else x[i if len(x) > 1 else 0], own)

    return Product(x, weight, ins == last, rows)
