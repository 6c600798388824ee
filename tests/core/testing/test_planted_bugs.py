"""The laws are tested too: each planted bug is found under the name that one expects."""

import dataclasses

import planted_arrays  # noqa: F401
import planted_gradients  # noqa: F401
import planted_jax  # noqa: F401
import planted_products  # noqa: F401
import planted_space  # noqa: F401
import planted_torch  # noqa: F401
import planted_update  # noqa: F401
import pytest
from planting import BUGS

from singd_core.testing import LAWS, LawError, backends
from singd_core.testing.report import cases
from singd_core.testing.run import run


def _backends(names, law):
    """The array libraries of these names, each with the dtypes that the law speaks of."""
    missing = [n for n in names if n not in [b.name for b in backends()]]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    chosen = []
    for b in backends():
        if b.name in names:
            dtypes = tuple(dtype for dtype in b.dtypes if law.speaks_of(b.name, dtype))
            chosen.append(dataclasses.replace(b, dtypes=dtypes))
    return chosen


def _first_error(structure, chosen):
    for law, backend, dtype in cases(chosen):
        try:
            run(law, structure, backend, dtype, shrink=False)
        except LawError as error:
            return error
    return None


# They take about a second each: all other laws of torch or jax are checked before theirs.
SLOW = {
    "AntisymmetricInTorch",
    "BoundsHugeGradients",
    "Detached",
    "DifferenceOfTheParent",
    "FieldsForAGradient",
    "FieldsOfTheClass",
    "ListsAGradient",
    "NaNAsZero",
    "NoGradientWhenTraced",
    "OtherInTorch",
    "ReadsMemoryInItsOrder",
    "ShortcutWhenMapped",
    "StopsTheGradient",
    "WidensForGood",
    "WritesInPlace",
}


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, marks=pytest.mark.slow if bug.structure.__name__ in SLOW else [])
        for bug in BUGS
    ],
    ids=lambda bug: bug.structure.__name__,
)
def test_a_planted_bug_is_found_under_the_expected_name(bug):
    """It breaks no law that is checked before, in the order of `check_structure`."""
    law = LAWS[bug.law]
    chosen = _backends(bug.backends, law)
    if not any(b.dtypes for b in chosen):
        pytest.skip(f"the law is not about this version: {law.backends}")
    error = _first_error(bug.structure, chosen)
    assert error is not None, "nothing was found"
    assert (error.law, error.structure) == (bug.law, bug.structure), error
    assert f'"{bug.law}"' in str(error)
    assert error.backend in bug.backends


def test_every_law_is_expected_of_a_planted_bug():
    assert {bug.law for bug in BUGS} == set(LAWS)
