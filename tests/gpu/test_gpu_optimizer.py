"""The pure optimizer on a GPU: the same steps as NumPy, no waiting, steady memory, and faster."""

import time

import numpy as np
import pytest
from gpus import LIBRARIES, SUBSTITUTE
from problem import CASES, LAYERS, each, each_pair, go, leaves, problem, train

import singd_core

JAX_CASES = ("normalized", "hierarchical")
# Relative to the largest entry: eight steps. Some divide by small numbers.
CLOSE = {"float64": 1e-9, "float32": 2e-3}

# Without jit, jax compiles every operation for every shape: it gets two cases.
RUNS = [(lib, case) for lib in LIBRARIES for case in CASES if lib != "jax" or case in JAX_CASES]
runs = pytest.mark.parametrize(("gpu", "case"), RUNS, indirect=["gpu"])


@pytest.mark.parametrize("dtype", CLOSE)
@runs
def test_steps_are_those_of_numpy(gpu, case, dtype):
    start, data = problem(8)
    expected, expected_state = train(singd_core.Optimizer, case, start, data)
    assert all(np.isfinite(x).all() for x in leaves(expected))
    ours, state = train(gpu.optimizer, case, start, data, lambda x: gpu.to(x, dtype))
    assert all(gpu.is_there(x) for x in leaves(ours))
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        size = max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(gpu.back(a), b, rtol=0, atol=CLOSE[dtype] * size)
    reference = dict(expected_state.named_arrays())
    for name, a in state.named_arrays():
        assert gpu.is_there(a), name
        if dtype == "float64":
            size = max(1.0, float(np.max(np.abs(reference[name]), initial=0.0)))
            np.testing.assert_allclose(
                gpu.back(a), reference[name], rtol=0, atol=CLOSE[dtype] * size, err_msg=name
            )


@runs
def test_steps_never_wait_for_the_gpu(gpu, case):
    start, data = problem(3)
    data[1] = each(lambda x: x * np.nan, data[1][0]), data[1][1]
    arrays = each(lambda x: gpu.to(x, "float32"), start)
    steps = [each_pair(lambda x: gpu.to(x, "float32"), step) for step in data]
    go(gpu.optimizer(LAYERS, **CASES[case]), arrays, steps)  # compiles, and fills caches
    with gpu.no_wait():
        _, state = go(gpu.optimizer(LAYERS, **CASES[case]), arrays, steps)
    assert gpu.back(state.skipped) == 1.0


def layer(gpu, d: int, n: int):
    """One layer of side d, with a batch of n."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: gpu.to(rng.standard_normal(shape), "float32")  # noqa: E731
    params, grads = {"map": draw(d, d)}, {"map": draw(d, d)}
    return params, grads, {"map": (draw(n, d), draw(n, d))}


@pytest.mark.parametrize("structure", ["dense", "diagonal", "hierarchical:16,16", "triltoeplitz"])
def test_the_pool_does_not_grow_after_the_first_refresh(gpu, structure):
    if gpu.reserved() is None:
        pytest.skip(f"{gpu.name} does not tell here what it holds")
    params, grads, rows = layer(gpu, 512, 256)
    optimizer = gpu.optimizer(structures=(structure, structure))
    state, sizes = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update(grads, state, params, rows)
        params = optimizer.apply(params, updates)
        gpu.wait()
        sizes.append(gpu.reserved())
    # the first step makes the state, the second is the first to free one
    assert sizes[2:] == [sizes[1]] * 4, sizes


def seconds(optimizer, params, grads, rows, wait, steps: int) -> float:
    """The best of a few steps."""
    state, best = optimizer.init(params), float("inf")
    for _ in range(steps):
        wait()
        start = time.perf_counter()
        _, state = optimizer.update(grads, state, params, rows)
        float(state.skipped)  # what was begun is done
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.skipif(SUBSTITUTE, reason="the CPU is no faster than itself")
def test_a_dense_refresh_of_a_large_layer_is_faster_than_on_the_host(gpu, record_property, capsys):
    given = {"structures": ("dense", "dense")}
    ours = seconds(gpu.optimizer(**given), *layer(gpu, 2048, 4096), gpu.wait, 5)

    class Host:
        to = staticmethod(lambda x, dtype: np.asarray(x, dtype))

    host = seconds(singd_core.Optimizer(**given), *layer(Host, 2048, 4096), lambda: None, 2)
    with capsys.disabled():
        print(f" {gpu.name}: {ours * 1e3:.1f} ms a step, NumPy {host * 1e3:.1f} ms", end="")
    record_property("ms", (ours * 1e3, host * 1e3))
    assert ours < host
