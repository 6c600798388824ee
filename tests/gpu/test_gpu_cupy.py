"""What `singd_cupy` adds: device, stream, 16-bit storage, exchange and pinned memory."""

from functools import partial

import numpy as np
import pytest
from gpus import SUBSTITUTE
from problem import CASES, LAYERS, each, each_pair, go, leaves, problem

pytestmark = pytest.mark.skipif(SUBSTITUTE, reason="these speak of CuPy's own devices and memory")


@pytest.fixture
def cp(of):
    of("cupy")
    import cupy

    return cupy


@pytest.fixture
def singd_cupy(cp):
    import singd_cupy

    return singd_cupy


def on_gpu(cp, dtype, steps=3):
    start, data = problem(steps)
    return each(lambda x: cp.asarray(x, dtype), start), [
        each_pair(lambda x: cp.asarray(x, dtype), step) for step in data
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_16_bits_are_storage_and_a_step_is_that_of_float32_rounded(cp, singd_cupy, case, dtype):
    if dtype == "bfloat16":
        dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    params, data = on_gpu(cp, dtype, steps=1)
    wide = each(lambda x: x.astype(cp.float32), params)
    wide_data = [each_pair(lambda x: x.astype(cp.float32), step) for step in data]
    of_factors = "float32" if dtype == "float16" else dtype
    make = partial(singd_cupy.Optimizer, LAYERS, **CASES[case])
    ours, state = go(make(rounding="nearest"), params, data)
    _, expected = go(make(), wide, wide_data)
    assert {x.dtype for x in leaves(ours)} == {np.dtype(dtype)}
    assert all(bool(cp.isfinite(x.astype(cp.float32)).all()) for x in leaves(ours))
    for name, layer in state.layers.items():
        pairs = zip(
            layer.factors.named_arrays(), expected.layers[name].factors.named_arrays(), strict=True
        )
        for (key, a), (_, b) in pairs:
            if not key.startswith("averages"):
                assert a.dtype == of_factors, key
            np.testing.assert_array_equal(
                a.astype(cp.float32).get(), b.astype(a.dtype).astype(cp.float32).get(), key
            )


def test_the_current_stream_is_used_and_kept(cp, singd_cupy):
    params, data = on_gpu(cp, "float32")
    expected, _ = go(singd_cupy.Optimizer(LAYERS), params, data)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        ours, _ = go(singd_cupy.Optimizer(LAYERS), params, data)
        assert cp.cuda.get_current_stream() == stream
        done = stream.record()
    done.synchronize()
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        np.testing.assert_allclose(a.get(), b.get(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_layers_state_lives_with_its_weight_on_several_devices(cp, singd_cupy, case):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only: on array-api-strict's devices this is tested everywhere")
    start, data = problem(4)
    devices = {name: cp.cuda.Device(i % 2) for i, name in enumerate(start)}

    def spread(tree):
        def on(device, value):
            with device:
                return each(lambda x: cp.asarray(x, "float64"), value)

        return {name: on(devices[name], value) for name, value in tree.items()}

    expected, _ = go(singd_cupy.Optimizer(LAYERS, **CASES[case]), *on_gpu(cp, "float64", 4))
    before = cp.cuda.Device().id
    ours, state = go(
        singd_cupy.Optimizer(LAYERS, **CASES[case]),
        spread(start),
        [(spread(grads), spread(rows)) for grads, rows in data],
    )
    assert cp.cuda.Device().id == before
    for name, layer in (state.layers | state.fallback).items():
        assert {x.device for _, x in layer.named_arrays()} == {devices[name]}, name
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        np.testing.assert_allclose(a.get(), b.get(), rtol=1e-9, atol=1e-9)


def test_torch_tensors_are_taken_and_given_without_a_copy(of, cp, singd_cupy):
    of("torch")
    import torch

    weight = torch.zeros(3, 4, device="cuda")
    view = singd_cupy.from_dlpack({"map": weight})["map"]
    assert view.data.ptr == weight.data_ptr()
    optimizer = singd_cupy.Optimizer()
    state = optimizer.init({"map": view})
    grads = {"map": cp.ones((3, 4), "float32")}
    rows = {"map": (cp.ones((5, 4), "float32"), cp.ones((5, 3), "float32"))}
    updates, state = optimizer.update(grads, state, {"map": view}, rows)
    view += updates["map"]  # writes into torch's memory
    cp.cuda.Device().synchronize()
    assert bool((weight < 0).all())
    change = torch.from_dlpack(updates["map"])
    assert change.data_ptr() == updates["map"].data.ptr
    half = torch.zeros(3, dtype=torch.bfloat16, device="cuda")
    pytest.importorskip("ml_dtypes")
    assert str(singd_cupy.from_dlpack(half).dtype) == "bfloat16"


def test_jax_arrays_are_taken_and_given_without_a_copy(of, cp, singd_cupy):
    of("jax")
    import jax
    import jax.numpy as jnp

    x = jnp.ones((3, 4), jnp.float32)
    view = singd_cupy.from_dlpack(x)
    assert view.data.ptr == x.unsafe_buffer_pointer()
    assert jax.dlpack.from_dlpack(view).unsafe_buffer_pointer() == view.data.ptr


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_state_goes_through_pinned_memory_and_comes_back(cp, singd_cupy, tmp_path, dtype):
    if dtype == "bfloat16":
        dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    params, data = on_gpu(cp, dtype)
    optimizer = singd_cupy.Optimizer(LAYERS)
    _, state = go(optimizer, params, data)
    flat = singd_cupy.flatten(state)
    for name, x in flat.items():
        if isinstance(x, np.ndarray) and x.size:
            attributes = cp.cuda.runtime.pointerGetAttributes(x.ctypes.data)
            assert attributes.type == cp.cuda.runtime.memoryTypeHost, name
    np.savez(tmp_path / "state.npz", **flat)
    with np.load(tmp_path / "state.npz") as saved:
        again = singd_cupy.unflatten(optimizer.init(params), dict(saved))
    assert again.step == state.step
    for (name, a), (_, b) in zip(state.named_arrays(), again.named_arrays(), strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device), name
        np.testing.assert_array_equal(a.get(), b.get(), name)
