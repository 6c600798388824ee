"""Many matrices share the size of their steps (5.10b)."""

import numpy as np
import pytest

from singd_core import Optimizer


def step(matrices: int) -> np.ndarray:
    """The first step of one of so many equal layers."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((16, 5)), rng.standard_normal((16, 4)) / 16
    params = {str(i): np.zeros((4, 5)) for i in range(matrices)} | {"scale": np.ones(5)}
    optimizer = Optimizer(warmup=0)
    grads = {name: g.T @ a if name != "scale" else np.ones(5) for name in params}
    rows = {str(i): (a, g) for i in range(matrices)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, rows)
    return updates["0"]


@pytest.mark.parametrize(("matrices", "share"), [(2, 1.0), (12, 1.0), (18, 2 / 3), (48, 0.25)])
def test_beyond_twelve_each_has_its_share(matrices: int, share: float) -> None:
    np.testing.assert_allclose(step(matrices), share * step(1), rtol=1e-12)
