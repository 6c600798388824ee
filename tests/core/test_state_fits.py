"""Saved states that are of another rule, or lack something."""

import numpy as np
import pytest
from optimizer_cases import LAYERS, params

from singd_core import Optimizer
from singd_core.state import flatten, unflatten


def test_averages_of_rows_begin_anew_where_gradients_refresh_now() -> None:
    p = {"map": np.ones((3, 4))}
    optimizer = Optimizer({})
    _, state = optimizer.update({"map": np.eye(3, 4)}, optimizer.init(p), p)
    flat = flatten(state) | {"map.averages.t_U": np.asarray(2.0)}
    found = unflatten(optimizer.init(p), flat).layers["map"].factors.averages
    assert not any(np.any(a) for _, a in found.named_arrays())


def test_a_layer_that_learns_from_gradients_now_begins_anew_and_is_named() -> None:
    p, rng = params(), np.random.default_rng(0)
    flat = flatten(Optimizer(LAYERS).init(p))
    template = Optimizer({}, structures="dense").init(p)
    with pytest.warns(UserWarning, match=r"where these learn from gradients now: .*map.*anew"):
        found = unflatten(template, flat | {"map.momentum_buffer": rng.standard_normal((4, 3))})
    assert not np.any(found.layers["map"].momenta[0])


def test_what_is_missing_else_is_an_error() -> None:
    optimizer = Optimizer(LAYERS)
    flat = flatten(optimizer.init(params()))
    del flat["map.K.matrix"]
    with pytest.raises(ValueError, match=r"has no 'map\.K\.matrix'"):
        unflatten(optimizer.init(params()), flat)


@pytest.mark.parametrize("name", ["step", "largest_lr"])
def test_a_number_that_is_missing_is_an_error(name: str) -> None:
    optimizer = Optimizer(LAYERS)
    flat = flatten(optimizer.init(params()))
    del flat[name]
    with pytest.raises(ValueError, match=f"has no '{name}': is it what"):
        unflatten(optimizer.init(params()), flat)
