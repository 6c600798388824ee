"""The pure optimizer takes the same steps on every array library, and never waits for a device."""

import pickle
from typing import Any

import numpy as np
import pytest
from optimizer_cases import LAYERS, leaves, mapped, params, steps, train

from singd_core import Fallback, Optimizer
from singd_core.testing import Backend, backends, no_host_sync
from singd_core.testing.pytree_jax import register_trees

BACKENDS = backends()
NUMPY = BACKENDS[0]
OTHERS = [b for b in BACKENDS[1:] if "float64" in b.dtypes]
EAGER = [b for b in OTHERS if b.library != "jax"]  # there each new operation compiles

# Relative to the largest entry, float64: eight steps. Some divide by small numbers.
CLOSE = 1e-10

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.1},
    "normalized, second order": {"recipe": "paper", "normalize_lr_cov": True, "order": 2},
    "kfac": {"kfac": True},
    "kfac, paper": {"recipe": "paper", "kfac": True},
    "reduce": {"kfac_approx": "reduce", "loss_average": None},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:2", "blockdiagonal:3")},
    "triangular": {"structures": ("tril", "triu")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:1,2", "triubottomrightdiag")},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.1},
}


def optimizer_for(case: str) -> Optimizer:
    return Optimizer(LAYERS, **CASES[case])


def assert_close(ours: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    size = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=CLOSE * size, err_msg=name)


def assert_alike(backend: Backend, ours: Any, expected: Any) -> None:
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        assert_close(backend.back(a), b)


def pairs() -> list[Any]:
    """Each library with each case. The cases that jax compiles for long are slow."""
    return [
        pytest.param(b, case, id=f"{b}-{case}", marks=[pytest.mark.slow] * (b.library == "jax"))
        for b in OTHERS
        for case in CASES
    ]


@pytest.mark.parametrize(("backend", "case"), pairs())
def test_steps_are_those_of_numpy(backend: Backend, case: str) -> None:
    data = steps(8)
    expected, expected_state = train(optimizer_for(case), data, params())
    assert all(np.isfinite(leaf).all() for leaf in leaves(expected))
    with backend.active():
        ours, state = train(optimizer_for(case), data, params(), lambda x: backend.to(x, "float64"))
        assert_alike(backend, ours, expected)
        states = dict(expected_state.named_arrays())
        for name, value in state.named_arrays():
            assert_close(backend.back(value), states[name], name)


@pytest.mark.parametrize("case", CASES)
def test_steps_never_wait_for_the_device(case: str) -> None:
    backend = next((b for b in BACKENDS if b.library == "strict"), None)
    if backend is None:
        pytest.skip("array-api-strict is not installed")
    data = steps(3)
    data[1] = (mapped(lambda x: x * np.nan, data[1][0]), data[1][1])
    arrays = mapped(lambda x: backend.to(x, "float64"), params())
    data = [tuple(mapped(lambda x: backend.to(x, "float64"), part) for part in one) for one in data]
    optimizer = optimizer_for(case)
    with no_host_sync():
        train(optimizer, data, arrays)


def only(names: tuple[str, ...], tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name in names}


# One layer and one other parameter compile in a few seconds; all of them with all settings do not.
FEW, ALL = ("map", "number"), tuple(params())
JIT = [("normalized", FEW), *(pytest.param(c, ALL, marks=pytest.mark.slow) for c in CASES)]


@pytest.mark.parametrize(("case", "names"), JIT)
def test_steps_run_under_jax_jit(case: str, names: tuple[str, ...]) -> None:
    """A step that is not finite among them is counted there, too."""
    jax = pytest.importorskip("jax")
    backend = next(b for b in BACKENDS if b.library == "jax")
    register_trees()
    data = [(only(names, g), only(names, rows)) for g, rows in steps(6)]
    data[3] = mapped(lambda x: x * np.nan, data[3][0]), data[3][1]
    optimizer = Optimizer(only(names, LAYERS), **CASES[case])
    with np.errstate(invalid="ignore"):
        expected, expected_state = train(optimizer, data, only(names, params()))
    with backend.active():
        update, start = jax.jit(optimizer.update), only(names, params())
        ours, state = train(
            optimizer, data, start, lambda x: backend.to(x, "float64"), update=update
        )
        assert_alike(backend, ours, expected)
        assert (int(state.step), int(state.skipped)) == (6, 1)
        assert (expected_state.step, expected_state.skipped) == (6, 1)


@pytest.mark.parametrize("backend", [NUMPY, *EAGER], ids=str)
def test_rates_may_be_arrays_on_the_device(backend: Backend) -> None:
    """A schedule can then run there."""
    given = {"lr": 0.05, "momentum": 0.8, "damping": 0.3, "weight_decay": 0.1, "lr_cov": 0.2}
    data = steps(4)
    expected, _ = train(Optimizer(LAYERS, **given), data, params())
    with backend.active():
        arrays = {name: backend.to(np.asarray(value), "float64") for name, value in given.items()}
        ours, _ = train(
            Optimizer(LAYERS, **arrays), data, params(), lambda x: backend.to(x, "float64")
        )
        assert_alike(backend, ours, expected)


@pytest.mark.parametrize("backend", [NUMPY, *EAGER], ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "damping", "lr_cov", "lr of AdamW"])
def test_a_negative_rate_in_an_array_changes_nothing_and_is_counted(
    name: str, backend: Backend
) -> None:
    """As one that is not finite: a schedule may pass 0 by mistake, and weights would ascend."""
    data = steps(2)
    with backend.active():
        arrays = mapped(lambda x: backend.to(x, "float64"), params())
        (g, rows), (later, _) = (
            tuple(mapped(lambda x: backend.to(x, "float64"), part) for part in one) for one in data
        )
        for value, skipped in ((-0.01, 1), (-0.0, 0)):
            rate = backend.to(np.asarray(value), "float64")
            given = {"fallback": Fallback(lr=rate)} if name == "lr of AdamW" else {name: rate}
            optimizer = Optimizer(LAYERS, **given)
            _, state = Optimizer(LAYERS).update(g, optimizer.init(arrays), arrays, rows)
            updates, new = optimizer.update(later, state, arrays)
            assert int(backend.back(new.skipped)) == skipped
            moved = [bool(np.any(backend.back(leaf))) for leaf in leaves(updates)]
            assert any(moved) != bool(skipped)
            assert new.largest_lr == state.largest_lr


@pytest.mark.parametrize("backend", [NUMPY, *EAGER], ids=str)
def test_inputs_are_left_as_they_are(backend: Backend) -> None:
    data, start = steps(2), params()
    with backend.active():
        arrays = mapped(lambda x: backend.to(x, "float64"), start)
        grads, rows = (mapped(lambda x: backend.to(x, "float64"), one) for one in data[0])
        optimizer = optimizer_for("normalized")
        state = optimizer.init(arrays)
        before = {name: backend.back(a).copy() for name, a in state.named_arrays()}
        optimizer.update(grads, state, arrays, rows)
        for mine, original in ((arrays, start), (grads, data[0][0]), (rows, data[0][1])):
            for a, b in zip(leaves(mine), leaves(original), strict=True):
                assert np.array_equal(backend.back(a), b)
        for name, a in state.named_arrays():
            assert np.array_equal(backend.back(a), before[name])


def test_float32_stays_float32() -> None:
    """Also with rates that are NumPy's float64 scalars, as a schedule made with NumPy returns."""
    rates = {name: np.float64(0.1) for name in ("lr", "momentum", "damping", "weight_decay")}
    for given in (rates | {"lr_cov": lambda step: np.float64(0.1)}, rates | {"recipe": "paper"}):
        narrow = np.float32
        p, state = train(Optimizer(LAYERS, **given), steps(3), params(), narrow)
        assert {leaf.dtype for leaf in leaves(p)} == {np.dtype(narrow)}
        dtypes = {name: a.dtype for name, a in state.named_arrays() if name != "skipped"}
        assert set(dtypes.values()) == {np.dtype(narrow)}, dtypes


@pytest.mark.parametrize("case", CASES)
def test_pickled_state_goes_on_bit_for_bit(case: str) -> None:
    data = steps(8)
    expected, expected_state = train(optimizer_for(case), data, params())
    optimizer = optimizer_for(case)
    middle, state = train(optimizer, data[:3], params())
    p, state = pickle.loads(pickle.dumps((middle, state)))
    again = optimizer_for(case)
    for g, rows in data[3:]:
        updates, state = again.update(g, state, p, rows if again.due(state) else None)
        p = again.apply(p, updates)
    for a, b in zip(leaves(p), leaves(expected), strict=True):
        assert np.array_equal(a, b)
    for (name, a), (_, b) in zip(state.named_arrays(), expected_state.named_arrays(), strict=True):
        assert np.array_equal(a, b), name


@pytest.mark.parametrize("backend", EAGER, ids=str)
def test_state_of_every_library_can_be_pickled(backend: Backend) -> None:
    with backend.active():
        to = lambda x: backend.to(x, "float64")  # noqa: E731
        _, state = train(optimizer_for("hierarchical"), steps(2), params(), to)
        again = pickle.loads(pickle.dumps(state))
        for (name, a), (_, b) in zip(state.named_arrays(), again.named_arrays(), strict=True):
            assert np.array_equal(backend.back(a), backend.back(b)), name
