"""Transformer blocks as others write them: nearly all of their numbers are preconditioned."""

from pathlib import Path

import jax
import pytest
from cases import cases
from jax_idioms import IDIOMS, TOKENS, B

import singd_jax

PAGE = (Path(__file__).parents[2] / "docs/jax.md").read_text()

SLOW = {"easylm", "gemma", "levanter", "maxtext"}


@pytest.mark.parametrize("name", cases(IDIOMS, fast=IDIOMS.keys() - SLOW))
def test_nearly_all_numbers_are_preconditioned(name):
    loss, params = IDIOMS[name]()
    layers = singd_jax.find_layers(loss, batch_size=B)(params, TOKENS)
    found = sum(part.numbers for layer in layers.values() for part in layer.parts)
    share = found / sum(a.size for a in jax.tree.leaves(params))
    assert share >= 0.95, layers
    assert f"| `{name}` | {100 * share:.1f} % |" in PAGE
    gaps = singd_jax.check(loss, layers)(params, TOKENS)
    assert set(gaps) == set(layers)
