"""States of before 0.1 load: one momentum for a matrix and its bias, of natural gradients."""

from typing import Any

import numpy as np
import pytest
from optimizer_cases import LAYERS, params, steps, train

from singd_core import Optimizer
from singd_core.state import flatten, unflatten


def before(optimizer: Optimizer) -> tuple[Any, dict[str, Any]]:
    """A state as it is, and as it was saved then."""
    _, state = train(optimizer, steps(3), params())
    flat = flatten(state)
    for name, kind in LAYERS.items():
        keys = f"{name}.momentum_buffer", f"{name}.bias_momentum_buffer"
        weight, bias = flat.pop(keys[0]), flat.pop(keys[1], None)
        flat[keys[0]] = kind.matrix(weight, bias)
    return state, {key: a for key, a in flat.items() if ".late." not in key}


def test_a_momentum_of_natural_gradients_is_parted() -> None:
    optimizer = Optimizer(LAYERS, recipe="paper")
    state, flat = before(optimizer)
    new = unflatten(optimizer.init(params()), flat)
    for (key, a), (_, b) in zip(new.named_arrays(), state.named_arrays(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)


def test_a_rule_that_averages_gradients_begins_anew_with_it() -> None:
    optimizer = Optimizer(LAYERS)
    state, flat = before(optimizer)
    new = unflatten(optimizer.init(params()), flat)
    for name, layer in new.layers.items():
        assert not any(np.any(m) for m in layer.momenta or ())
        assert not any(np.any(a) for _, a in layer.late.named_arrays())
        pairs = zip(
            layer.factors.named_arrays(), state.layers[name].factors.named_arrays(), strict=True
        )
        assert all(np.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_the_largest_rate_begins_anew_where_it_was_not_kept() -> None:
    optimizer = Optimizer(LAYERS)
    _, state = train(optimizer, steps(3), params())
    flat = flatten(state)
    assert flat.pop("largest_lr") == 0.12
    assert unflatten(optimizer.init(params()), flat).largest_lr == 0.0


def test_sums_over_late_gradients_begin_anew_where_they_were_not_kept() -> None:
    optimizer = Optimizer(LAYERS)
    _, state = train(optimizer, steps(3), params())
    flat = flatten(state)
    for name in state.layers:
        del flat[f"{name}.late.mean"], flat[f"{name}.late.steps"], flat[f"{name}.late.noise"]
    new = unflatten(optimizer.init(params()), flat)
    for name, layer in new.layers.items():
        old = state.layers[name].late
        assert not np.any(layer.late.mean)
        assert not np.any(layer.late.steps)
        np.testing.assert_array_equal(layer.late.squares, old.squares)
        np.testing.assert_allclose(layer.late.noise, old.squares / 1.9)
    del flat["map.late.growth"]
    flat["map.late.noise"] = state.layers["map"].late.noise
    with pytest.raises(ValueError, match=r"has no 'map\.late\.growth'"):
        unflatten(optimizer.init(params()), flat)


def test_averages_of_rows_begin_anew_where_gradients_refresh_now() -> None:
    p = {"map": np.ones((3, 4))}
    optimizer = Optimizer({})
    _, state = optimizer.update({"map": np.eye(3, 4)}, optimizer.init(p), p)
    flat = flatten(state) | {"map.averages.t_U": np.asarray(2.0)}
    found = unflatten(optimizer.init(p), flat).layers["map"].factors.averages
    assert not any(np.any(a) for _, a in found.named_arrays())


def test_what_is_missing_else_is_an_error() -> None:
    optimizer = Optimizer(LAYERS)
    flat = flatten(optimizer.init(params()))
    del flat["map.K.matrix"]
    with pytest.raises(ValueError, match=r"has no 'map\.K\.matrix'"):
        unflatten(optimizer.init(params()), flat)
