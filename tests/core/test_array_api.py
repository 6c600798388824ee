"""The core needs no more than the revision of the array API that docs/arrays.md names."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimizer_cases import LAYERS, leaves, mapped, params, steps, train

from singd_core import Embedding, Optimizer

xp = pytest.importorskip("array_api_strict")
PAGE = (Path(__file__).parents[2] / "docs" / "arrays.md").read_text()
REVISION = re.search(r"revision (\d{4}\.\d{2})", PAGE)

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "normalize_lr_cov": True, "order": 2, "weight_decay": 0.1},
    "kfac": {"kfac": True},
    "sampled": {"rows": 2},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:1,1", "trilbottomrightdiag:2")},
    "blocks": {"structures": ("blockdiagonal:2", "diagonal")},
    "reduce": {"kfac_approx": "reduce"},
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_numpy_in_the_revision_that_the_page_names(case: str) -> None:
    assert REVISION is not None
    expected, _ = train(Optimizer(LAYERS, **CASES[case]), steps(4), params())
    with xp.ArrayAPIStrictFlags(api_version=REVISION[1]):
        ours, _ = train(Optimizer(LAYERS, **CASES[case]), steps(4), params(), xp.asarray)
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-10 * (1 + np.max(np.abs(b))))


def test_a_look_up_needs_no_more() -> None:
    assert REVISION is not None
    table, x, g = np.ones((5, 2)), np.array([[0, 3], [3, 4]]), np.ones((2, 2, 2))
    found = []
    for to in (np.asarray, xp.asarray):
        with xp.ArrayAPIStrictFlags(api_version=REVISION[1]):
            optimizer = Optimizer({"e": Embedding(5)})
            p = mapped(to, {"e": table})
            updates, _ = optimizer.update(p, optimizer.init(p), p, {"e": (to(x), to(g))})
        found.append(np.asarray(updates["e"]))
    np.testing.assert_allclose(*found, rtol=1e-6)
