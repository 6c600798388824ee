"""Laws of the update from gradients alone: K (side d) and C (side d_out) have the structure.

The oracle is section 6 of the mathematics page on dense matrices in NumPy float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from singd_core._recipes import settings
from singd_core.optimizer import Optimizer
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.laws_update import compare
from singd_core.testing.mismatch import require
from singd_core.testing.recursion import learn, page_of_gradients

_PLAIN = ("numpy", "torch", "cupy")


def draw_gradients(case: Case, steps: int, batch: tuple[int, ...] = ()) -> list[Any]:
    """The gradients of some steps, shape (*batch, d_out, d)."""
    return [case.array(f"∇W{t}", *batch, case.d_out, case.d) for t in range(steps)]


@law(backends=("numpy", "strict", "torch", "cupy"), examples=2, sizes=(1, 4))
def gradients_teach_as_on_the_page(case: Case) -> None:
    """The update from gradients is the recursion of the mathematics page, in the dtype it had."""
    gradients, s = draw_gradients(case, 2), settings()
    factors = learn(case, gradients, s)
    for L in (factors.K, factors.C):
        for _, a in L.named_arrays():
            require(a.dtype == case.to(0.0).dtype, f"a factor is in {a.dtype}")
    compare(case, factors, *page_of_gradients(case, gradients, s))


@law(backends=_PLAIN, dtypes=("float64", "float32"), examples=1, sizes=(1, 4))
def gradients_of_any_scale(case: Case) -> None:
    """A gradient multiplied by a power of two, another in each step, changes no factor."""
    case.floats = True
    gradients, s = draw_gradients(case, 3), settings()
    once, scales = learn(case, gradients, s), (2.0**20, 1.0, 2.0**-20)
    more = learn(case, [G * c for G, c in zip(gradients, scales, strict=True)], s)
    compare(case, more, case.numpy(once.K), case.numpy(once.C))


@law(backends=_PLAIN, dtypes=("float64", "float32", "bfloat16"), examples=1, sizes=(1, 4))
def gradients_keep_factors_regular(case: Case) -> None:
    """K and C stay finite and regular whatever comes: gradients of scales 1e±15, and zeros."""
    case.floats = True
    scales = (1.0, 1e15, 0.0, 1e-15, 1.0, 1e15)
    gradients = [G * c for G, c in zip(draw_gradients(case, len(scales)), scales, strict=True)]
    factors = learn(case, gradients, settings())
    for name in ("K", "C"):
        dense = case.numpy(getattr(factors, name))
        require(bool(np.all(np.isfinite(dense))), f"{name} is not finite")
        require(np.linalg.slogdet(dense)[0] > 0.0, f"{name} was singular")


@law(backends=_PLAIN, dtypes=("float64", "float32"), examples=2, sizes=(4,))
def gradients_of_a_stack_equal_a_loop(case: Case) -> None:
    """Stacked factors learn as each of them alone, also where one gradient is zero, one large."""
    scales = case.to([[[1.0]], [[0.0]], [[2.0**20]]])
    stacks, s = [G * scales for G in draw_gradients(case, 2, (3,))], settings()
    found = learn(case, stacks, s, batch=(3,))
    for i in range(3):
        alone = learn(case, [G[i, ...] for G in stacks], s)
        case.near_entry(i, found, alone)


@law(backends=_PLAIN, dtypes=("float64",), examples=1, sizes=(4,))
def gradients_of_nan_change_nothing(case: Case) -> None:
    """A step along a gradient with NaN changes nothing, and is counted as skipped."""
    W, first, second = case.array("W", case.d_out, case.d), *draw_gradients(case, 2)
    optimizer = Optimizer({}, structures=(case.S, case.S))
    _, before = optimizer.update({"W": first}, optimizer.init({"W": W}), {"W": W})
    spoilt = case.numpy(second).copy()
    spoilt[0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        change, after = optimizer.update({"W": case.to(spoilt)}, before, {"W": W})
    case.equal(change["W"], np.zeros(W.shape), "the change of W")
    case.equal(after.skipped, np.ones(()), "skipped")
    for (name, new), (_, old) in zip(after.named_arrays(), before.named_arrays(), strict=True):
        if name != "skipped":
            case.equal(new, old, name)
