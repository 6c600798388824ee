"""`singd_cupy.Optimizer` on other arrays than CuPy's: devices, dtypes, memory and bad input."""

import collections
import tracemalloc
from typing import Any

import array_api_strict as strict
import ml_dtypes
import numpy as np
import pytest
import torch
from array_api_compat import to_device

import singd_core
import singd_cupy
from singd_core.state import flatten
from singd_core.testing import no_host_sync
from singd_core.testing.fake_cuda import fake_cuda
from singd_cupy import _cuda

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.1},
    "kfac": {"kfac": True},
    "mixed": {"structures": ("hierarchical:1,2", "triltoeplitz"), "kfac_approx": "reduce"},
}
SHAPES = {"first": ((5, 4), (5,)), "second": ((3, 5), (3,)), "vector": (6,), "number": ()}


def draw(rng: np.random.Generator, shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: draw(rng, shape) for name, shape in shapes.items()}
    if shapes and isinstance(shapes[0], tuple):
        return tuple(draw(rng, shape) for shape in shapes)
    return rng.standard_normal(shapes)


def problem(steps: int = 5) -> tuple[Any, list[Any]]:
    """Parameters, and for each step gradients and rows: any numbers."""
    rng = np.random.default_rng(0)
    rows = {"first": ((7, 2, 4), (7, 2, 5)), "second": ((7, 5), (7, 3))}
    return draw(rng, SHAPES), [(draw(rng, SHAPES), draw(rng, rows)) for _ in range(steps)]


def each(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: each(function, value) for name, value in tree.items()}
    return tuple(map(function, tree)) if isinstance(tree, tuple) else function(tree)


def in_dtype(tree: Any, dtype: Any) -> Any:
    return each(lambda x: np.asarray(x, dtype), tree)


def arrays_of(tree: Any) -> list[Any]:
    if hasattr(tree, "named_arrays"):
        return [x for _, x in tree.named_arrays()]
    found: list[Any] = []
    each(found.append, tree)
    return found


def train(make: Any, start: Any, data: Any, case: str) -> tuple[Any, Any]:
    optimizer = make(**CASES[case])
    state = optimizer.init(start)
    for grads, rows in data:
        due = optimizer.due(state)
        updates, state = optimizer.update(grads, state, start, rows if due else None)
        start = optimizer.apply(start, updates)
    return start, state


# ---- devices -----------------------------------------------------------------------------------


def placed(tree: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    def at(device: Any) -> Any:
        return lambda x: strict.asarray(np.asarray(x), device=device)

    return {name: each(at(places[name]), value) for name, value in tree.items()}


@pytest.mark.parametrize("case", CASES)
def test_each_layers_state_lives_with_its_weight_on_several_devices(elsewhere, case):
    """array-api-strict refuses every operation on arrays of two devices."""
    one, two, cpu = strict.Device("device1"), strict.Device("device2"), strict.Device("CPU_DEVICE")
    places = {"first": one, "second": two, "vector": two, "number": one}
    start, data = problem()
    expected, expected_state = train(singd_core.Optimizer, start, data, case)
    arrays = placed(start, places)
    steps = [(placed(grads, places), placed(rows, places)) for grads, rows in data]
    with no_host_sync():
        ours, state = train(singd_cupy.Optimizer, arrays, steps, case)
    for name, device in places.items():
        assert {x.device for x in arrays_of(ours[name])} == {device}
    for name, layer in (state.layers | state.fallback).items():
        assert {x.device for _, x in layer.named_arrays()} == {places[name]}, name
    for name, x in flatten(state).items():
        if name not in ("step", "largest_lr"):
            mine = np.asarray(to_device(x, cpu))
            np.testing.assert_allclose(
                mine, flatten(expected_state)[name], rtol=1e-10, atol=1e-12, err_msg=name
            )
    np.testing.assert_allclose(
        np.asarray(to_device(ours["second"][0], cpu)), expected["second"][0], rtol=1e-10
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("devices", [("meta", "meta"), ("cuda:0", "cuda:1")], ids=str)
def test_steps_run_where_arrays_have_no_numbers(elsewhere, case, devices):
    """On the device `meta`, and on two fake GPUs: whoever reads a number there fails."""
    places = dict(zip(SHAPES, (*devices, *devices), strict=True))

    def at(tree: dict[str, Any]) -> Any:
        return {
            name: each(lambda x, d=places[name]: torch.empty(x.shape, device=d), value)
            for name, value in tree.items()
        }

    start, data = problem(steps=2)
    start = in_dtype(start, float)
    with fake_cuda():
        steps = [(at(grads), at(rows)) for grads, rows in data]
        ours, state = train(singd_cupy.Optimizer, at(start), steps, case)
        for name, layer in (state.layers | state.fallback).items():
            found = {str(x.device) for _, x in layer.named_arrays()}
            assert found == {places[name]}, name
        assert str(ours["second"][0].device) == places["second"]


# ---- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_in_float32_it_is_the_core_bit_for_bit(elsewhere, case):
    start, data = problem()
    start = in_dtype(start, np.float32)
    data = [(in_dtype(grads, np.float32), in_dtype(rows, np.float32)) for grads, rows in data]
    expected = train(singd_core.Optimizer, start, data, case)
    ours = train(singd_cupy.Optimizer, start, data, case)
    for a, b in zip(ours, expected, strict=True):
        for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_16_bits_are_storage_and_a_step_is_that_of_float32_rounded(elsewhere, case, dtype):
    start, data = problem(steps=1)
    narrow, grads, rows = (in_dtype(part, dtype) for part in (start, *data[0]))
    wide = [in_dtype(part, np.float32) for part in (narrow, grads, rows)]

    of_factors = np.float32 if dtype is np.float16 else dtype
    ours = singd_cupy.Optimizer(**CASES[case], rounding="nearest")
    updates, state = ours.update(grads, ours.init(narrow), narrow, rows)
    core = singd_core.Optimizer(**CASES[case])
    expected, expected_state = core.update(wide[1], core.init(wide[0]), wide[0], wide[2])

    for x, y in zip(arrays_of(updates), arrays_of(expected), strict=True):
        assert x.dtype == dtype
        # the natural gradient is made with the factors as stored: their rounding enters once
        np.testing.assert_allclose(
            x.astype(np.float64), y, rtol=0, atol=40 * eps(dtype) * abs(y).max()
        )
    flat, reference = flatten(state), flatten(expected_state)
    for name in flat:
        if any(part in name for part in (".K.", ".C.", ".m_K.", ".m_C.", ".S_", ".P_")):
            assert flat[name].dtype == of_factors, name
            np.testing.assert_array_equal(flat[name], reference[name].astype(of_factors), name)
        elif ".averages." in name or name.endswith("exp_avg_sq"):
            assert flat[name].dtype == np.float32, name
            np.testing.assert_array_equal(flat[name], reference[name], name)


def eps(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def test_no_16_bit_array_reaches_the_core(elsewhere, monkeypatch):
    start, data = problem(steps=1)
    narrow, grads, rows = (in_dtype(part, ml_dtypes.bfloat16) for part in (start, *data[0]))
    optimizer = singd_cupy.Optimizer()
    state = optimizer.init(narrow)
    seen: list[Any] = []

    class Spy(singd_cupy.Optimizer):
        def _run(self, function, owner, *arguments, like=None):
            def spied(*given):
                seen.extend(x for argument in given for x in deep(argument))
                return function(*given)

            return super()._run(spied, owner, *arguments, like=like)

    def deep(value):
        if hasattr(value, "named_arrays"):
            return [x for _, x in value.named_arrays()]
        if isinstance(value, (tuple, list)):
            return [x for part in value for x in deep(part)]
        return [value] if hasattr(value, "dtype") else []

    Spy().update(grads, state, narrow, rows)
    assert len(seen) > 30
    assert all(x.dtype.itemsize >= 4 or x.dtype == bool for x in seen)


# ---- memory ------------------------------------------------------------------------------------


def test_nothing_more_is_allocated_after_the_first_steps(elsewhere):
    rng = np.random.default_rng(0)
    params = {"map": (rng.standard_normal((200, 100)), np.zeros(200)), "vector": np.ones(5000)}
    rows = {"map": (rng.standard_normal((64, 100)), rng.standard_normal((64, 200)))}
    optimizer = singd_cupy.Optimizer()
    state, held, peaks = optimizer.init(params), [], []
    tracemalloc.start()
    for _ in range(6):
        tracemalloc.reset_peak()
        updates, state = optimizer.update(params, state, params, rows)
        params = optimizer.apply(params, updates)
        current, peak = tracemalloc.get_traced_memory()
        held.append(current)
        peaks.append(peak)
    tracemalloc.stop()
    # Python's own objects come and go: a few kB beside megabytes of arrays.
    assert max(held[2:]) - held[1] < 20_000 < held[1]
    assert max(peaks[2:]) - peaks[1] < 20_000 < peaks[1]


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [np.ones((2, 3)), torch.ones(2, 3)], ids=["NumPy", "torch"])
def test_arrays_of_another_library_are_an_error_that_names_the_way(x):
    with pytest.raises(
        TypeError, match=r"not (numpy.ndarray|torch.Tensor).*singd_cupy.from_dlpack"
    ):
        singd_cupy.Optimizer().init({"map": x})


def test_the_device_of_a_cupy_array_is_found(foreign):
    x = foreign(np.ones(3, np.float32), device=1)
    assert _cuda.device_of(x).id == 1
    assert _cuda.moved(x, x.device) is x


# ---- exchange and checkpoints ------------------------------------------------------------------


def test_from_dlpack_keeps_structure_and_memory(monkeypatch):
    monkeypatch.setattr("cupy.from_dlpack", np.from_dlpack)
    weight, bias, other = torch.zeros(2, 3), torch.zeros(2), torch.zeros(4)
    Pair = collections.namedtuple("Pair", "weight bias")
    views = singd_cupy.from_dlpack({"map": Pair(weight, bias), "others": [other]})
    views["map"][0][1, 2] = 5.0
    views["others"][0][0] = 7.0
    assert (weight[1, 2].item(), other[0].item()) == (5.0, 7.0)
    assert isinstance(views["map"], Pair)


def test_a_bfloat16_state_comes_back_from_npz(elsewhere, tmp_path):
    start, data = problem(steps=1)
    narrow, grads, rows = (in_dtype(part, ml_dtypes.bfloat16) for part in (start, *data[0]))
    optimizer = singd_cupy.Optimizer()
    _, state = optimizer.update(grads, optimizer.init(narrow), narrow, rows)
    np.savez(tmp_path / "state.npz", **flatten(state))
    with np.load(tmp_path / "state.npz") as saved:
        again = singd_cupy.unflatten(optimizer.init(narrow), dict(saved))
    for (name, a), (_, b) in zip(state.named_arrays(), again.named_arrays(), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, name)
