"""Rows of any scale, none included, leave the factors finite and regular."""

import numpy as np
import pytest
import torch

from singd_core import rules, settings
from singd_core.curvature import Curvature, measure
from singd_core.structures import Dense, Diagonal, Structure


@pytest.mark.parametrize("structure", [Dense, Diagonal])
def test_sums_of_bfloat16_rows_do_not_stop_growing(structure: type[Structure]) -> None:
    """1 added to 256 is 256 in bfloat16; the traces would be of other rows than their factors."""
    one = measure(
        structure(torch.eye(2).diagonal() if structure is Diagonal else torch.eye(2)),
        torch.ones(1, 2),
    )
    one = one.map(lambda a: a.to(torch.bfloat16))
    total = one
    for _ in range(1023):
        total = total + one
    assert total.S.trace() == total.squares == 2048.0


@pytest.mark.parametrize("structure", [Dense, Diagonal])
def test_squares_of_bfloat16_rows_are_summed_in_float32(structure: type[Structure]) -> None:
    rows = torch.linspace(0.0, 1.0, 3000).reshape(1000, 3).to(torch.bfloat16)
    found = measure(structure.identity(3, like=rows), rows).squares
    assert found.item() == pytest.approx(rows.double().square().sum().item(), rel=1e-6)


def test_huge_inputs_without_output_gradients_leave_the_factors_as_they_are() -> None:
    """The squared norm of m leaves float32 there, and β₁ is 0: their product was no number."""
    s, like = settings("normalized"), np.zeros(1, dtype=np.float32)
    factors = rules.start((Dense, Dense), ((), 2, 1), s, like, like)
    for scale_A, scale_B in ((1e-6, 1e6), (1e6, 0.0)):
        before = factors
        inputs, outputs = factors.measure(
            np.full_like(like, scale_A, shape=(3, 1)), np.full_like(like, scale_B, shape=(3, 2))
        )
        with np.errstate(over="ignore"):
            factors = factors.refresh(Curvature.of(inputs, 3, outputs, 1), 0.05, s)
    np.testing.assert_array_equal(factors.K.dense(), before.K.dense())
    np.testing.assert_array_equal(factors.C.dense(), before.C.dense())
