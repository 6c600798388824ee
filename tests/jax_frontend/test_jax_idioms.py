"""Transformer blocks as others write them: nearly all of their numbers are preconditioned."""

import jax
import pytest
from jax_idioms import IDIOMS, TOKENS, B

import singd_jax

# Of all numbers; what is left are scales of norms, and positions that are added.
LEAST = {"levanter": 0.97, "maxtext": 0.98, "gemma": 0.98} | dict.fromkeys(
    ("easylm", "penzai"), 0.99
)


SLOW = {"easylm", "gemma", "levanter", "maxtext"}
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in IDIOMS]


@pytest.mark.parametrize("name", CASES)
def test_nearly_all_numbers_are_preconditioned(name):
    loss, params = IDIOMS[name]()
    layers = singd_jax.find_layers(loss, batch_size=B)(params, TOKENS)
    found = sum(part.numbers for layer in layers.values() for part in layer.parts)
    assert found >= LEAST.get(name, 1.0) * sum(a.size for a in jax.tree.leaves(params)), layers
    gaps = singd_jax.check(loss, layers)(params, TOKENS)
    assert set(gaps) == set(layers)
