"""Rows of any scale, none included, leave the factors finite and regular."""

import numpy as np

from singd_core import preconditioner, settings
from singd_core.structures import Dense
from singd_core.updates.curvature import Curvature


def test_huge_inputs_without_output_gradients_leave_the_factors_as_they_are() -> None:
    """The squared norm of m leaves float32 there, and β₁ is 0: their product was no number."""
    s, like = settings("robust"), np.zeros(1, dtype=np.float32)
    factors = preconditioner.init((Dense, Dense), ((), 2, 1), s, like, like)
    for scale_A, scale_B in ((1e-6, 1e6), (1e6, 0.0)):
        before = factors
        inputs, outputs = factors.measure(
            np.full_like(like, scale_A, shape=(3, 1)), np.full_like(like, scale_B, shape=(3, 2))
        )
        with np.errstate(over="ignore"):
            factors = factors.refresh(Curvature.of(inputs, 3, outputs, 1), 0.05, s)
    np.testing.assert_array_equal(factors.K.dense(), before.K.dense())
    np.testing.assert_array_equal(factors.C.dense(), before.C.dense())
