"""Laws of a whole optimizer step, with the structure for K and for C of one weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import device

from singd_core.optimizer import Optimizer
from singd_core.testing.backends import backends
from singd_core.testing.draw import Case
from singd_core.testing.host_sync import no_host_sync
from singd_core.testing.law import law
from singd_core.testing.mismatch import require

# W (d_out, d), its gradient, and rows: inputs (3, d), and output gradients (3, d_out)
Step = tuple[Any, Any, Any, Any]


def optimizer_of(case: Case) -> Optimizer:
    """All that a step can do at once: every bound, both momenta, damping and decay."""
    given: dict[str, Any] = {"kfac_like": False, "alpha1": 0.5, "weight_decay": 0.125}
    return Optimizer(structures=(case.S, case.S), **given)


def draw_step(case: Case) -> Step:
    """What a first step is made of."""
    shapes = {"W": (case.d_out, case.d), "∇W": (case.d_out, case.d)}
    shapes |= {"A": (3, case.d), "B": (3, case.d_out)}
    W, gradient, A, B = (case.array(name, *shape) for name, shape in shapes.items())
    return W, gradient, A, B


def step(optimizer: Optimizer, state: Any, W: Any, gradient: Any, A: Any, B: Any) -> Any:
    """The change of W, and the new state."""
    change, state = optimizer.update({"W": gradient}, state, {"W": W}, {"W": (A, B)})
    return change["W"], state


def first_step(case: Case, given: Step) -> Any:
    """The change of W, and the state, after a first step."""
    optimizer = optimizer_of(case)
    return step(optimizer, optimizer.init({"W": given[0]}), *given)


def step_in_numpy(case: Case, given: Step) -> Any:
    """The first step in NumPy float64."""
    return first_step(
        Case(case.S, backends()[0], "float64", case.d, case.bytes),
        tuple(case.numpy(x) for x in given),  # type: ignore[arg-type]
    )


def compare_steps(case: Case, found: Any, expected: Any) -> None:
    """Compare a change and a state with NumPy's, and look at their dtypes."""
    states = dict(found[1].named_arrays())  # a step that `jit` counts is an array, and left out
    pairs = [(name, states[name], old) for name, old in expected[1].named_arrays()]
    for name, new, old in [("the change of W", found[0], expected[0]), *pairs]:
        dtype = case.to(0.0).dtype if name != "skipped" else new.dtype
        require(new.dtype == dtype, f"{name}: expected {dtype}, got {new.dtype}")
        size = float(np.max(np.abs(old), initial=1.0))
        # the start of the factors and the bounds divide by norms, sums of some d terms each
        case.near(new, old, 8.0 * case.d * size, name)


@law(
    backends=("numpy", "strict", "torch", "cupy"),
    dtypes=("float64", "float32"),
    examples=3,
    sizes=(1, 4),
)
def step_as_in_numpy(case: Case) -> None:
    """A whole step is as in NumPy float64, in the dtype and on the device of the weight."""
    given = draw_step(case)
    found = first_step(case, given)
    compare_steps(case, found, step_in_numpy(case, given))
    for name, x in (("the change of W", found[0]), *found[1].named_arrays()):
        require(device(x) == device(given[0]), f"{name} is on {device(x)}")


@law(backends=("numpy", "strict", "torch", "cupy"), dtypes=("float64",), examples=3, sizes=(1, 4))
def step_skips_what_is_not_finite(case: Case) -> None:
    """A step with NaN in the gradient or in a row changes nothing, and is counted as skipped."""
    optimizer, given = optimizer_of(case), draw_step(case)
    _, before = first_step(case, given)
    for i, what in ((1, "the gradient"), (2, "a row of inputs"), (3, "a row of gradients")):
        spoilt = case.numpy(given[i]).copy()
        spoilt[0, 0] = np.nan
        with np.errstate(invalid="ignore"):
            change, after = step(
                optimizer, before, *(case.to(spoilt) if i == j else x for j, x in enumerate(given))
            )
        case.equal(change, np.zeros(change.shape), f"NaN in {what}: the change of W")
        case.equal(after.skipped, np.ones(()), f"NaN in {what}: skipped")
        for (name, new), (_, old) in zip(after.named_arrays(), before.named_arrays(), strict=True):
            if name != "skipped":
                case.equal(new, old, f"NaN in {what}: {name}")


@law(backends=("strict",), examples=1, sizes=(4,))
def step_does_not_wait(case: Case) -> None:
    """A whole step on a device reads nothing back to the host."""
    given = draw_step(case)
    with no_host_sync():
        first_step(case, given)
