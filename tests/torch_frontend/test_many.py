"""Matrices of several shapes as one: each does what it does alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from singd_core import structures
from singd_core.structures import Structure
from singd_torch.tensors.layout import Group, Layout
from singd_torch.tensors.many import Many

# Structures, sides and axes of numbers; blocks of 3 stand with dense 3 × 3 matrices.
POOLED = [
    ("blockdiagonal:3", 7, (2,)),
    ("dense", 3, ()),
    ("diagonal", 5, (3,)),
    ("blockdiagonal:3", 2, ()),
    ("dense", 3, (2,)),
]
APART = [("triltoeplitz", 4, (2, 2)), ("tril", 3, ())]


def layout(given: Sequence[tuple[str, int, tuple[int, ...]]]) -> Layout:
    groups = [Group(structures.get(name), d, batch, 4) for name, d, batch in given]
    return Layout(groups, torch.device("cpu"))


def draw(groups: Sequence[Group]) -> list[Structure]:
    return [
        g.structure.restrict(torch.randn(*g.batch, g.side, g.side, dtype=torch.float64))
        for g in groups
    ]


def own(of: Layout, i: int, numbers: Tensor) -> Tensor:
    return numbers[of.numbers[i]].view(of.groups[i].batch)


def check_same(found: Many, expected: Sequence[Structure]) -> None:
    for a, b in zip(found.parts(), expected, strict=True):
        torch.testing.assert_close(a.dense(), b.dense())


OPERATIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "scale": lambda L, M, c: L.scale(c),
    "add": lambda L, M, c: L.add_scaled(c, M),
    "shift": lambda L, M, c: L.scale(1.0).shifted(-0.5),
    "gram": lambda L, M, c: L.gram(),
    "product": lambda L, M, c: L.matmul(M),
    "a number for all": lambda L, M, c: L.scale(0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_each(name: str) -> None:
    of, operation = layout(POOLED + APART), OPERATIONS[name]
    A, B = draw(of.groups), draw(of.groups)
    c = torch.randn(of.numbers[-1].stop, dtype=torch.float64)
    each = enumerate(zip(A, B, strict=True))
    expected = [operation(a, b, own(of, i, c)) for i, (a, b) in each]
    check_same(operation(Many.joined(of, A), Many.joined(of, B), c), expected)


def test_norms_of_matrices_and_of_rows() -> None:
    of = layout(POOLED + APART)
    A = draw(of.groups)
    both = Many.joined(of, A)
    torch.testing.assert_close(both.norm(), torch.cat([a.norm().reshape(-1) for a in A]))
    sizes = torch.cat([a.row_size().reshape(-1) for a in A])
    torch.testing.assert_close(both.row_size(), sizes)
    rows = torch.cat([a.row_norms().reshape(-1) for a in A])
    torch.testing.assert_close(both.row_norms(), rows)


@pytest.mark.parametrize("several", [len(POOLED) + len(APART), 3])
def test_numbers_on_rows_and_sums_of_squares_are_of_all_groups_or_of_the_first(
    several: int,
) -> None:
    of = layout(POOLED + APART)
    rows = torch.randn(of.rows[several - 1].stop, dtype=torch.float64)
    numbers = torch.randn(of.numbers[several - 1].stop, dtype=torch.float64)
    each = [rows[of.rows[i]].view(of.groups[i].count, -1) for i in range(several)]
    squares = torch.cat([own.square().sum(1) for own in each])
    torch.testing.assert_close(of.squares_of(rows), squares)
    spread = [
        numbers[of.numbers[i]][:, None].expand_as(own).reshape(-1) for i, own in enumerate(each)
    ]
    torch.testing.assert_close(of.on_rows(numbers), torch.cat(spread))


def test_squares_with_scaled_rows() -> None:
    of = layout(POOLED)
    A = draw(of.groups)
    scales = torch.rand(of.rows[-1].stop, dtype=torch.float64)
    squares = Many.joined(of, A).square_for(10, 0)
    assert squares is not None
    scaled = squares.scale_rows(scales)
    assert scaled is not None
    each = [scales[of.rows[i]].view(*group.batch, -1) for i, group in enumerate(of.groups)]
    expected = [a.square().scale_rows(c) for a, c in zip(A, each, strict=True)]  # type: ignore[union-attr]
    check_same(scaled, expected)
    assert Many.joined(of, A).square_for(0, 0) is None  # nothing is multiplied with them


def test_only_what_is_kept_is_written() -> None:
    of = layout(POOLED + APART)
    A, B = draw(of.groups), draw(of.groups)
    old, keep = Many.joined(of, A, owned=True), torch.rand(of.numbers[-1].stop) > 0.5
    old.write(Many.joined(of, B), keep)
    pairs = enumerate(zip(old.parts(), A, B, strict=True))
    for i, (found, a, b) in pairs:
        use = own(of, i, keep)[..., None, None]
        torch.testing.assert_close(found.dense(), torch.where(use, b.dense(), a.dense()))
