"""What the pure optimizer promises besides its equations."""

from typing import Any

import numpy as np
import pytest
from optimizer_cases import GIVEN, LAYERS, leaves, mapped, params, steps, train

from singd_core import Fallback, Linear, Optimizer
from singd_core.curvature import Curvature
from singd_core.rules.shampoo import Shampoo

# Relative to the largest entry, float64: sums in another order.
CLOSE = 1e-12


def assert_alike(ours: Any, expected: Any) -> None:
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * max(1.0, np.max(np.abs(b))))


@pytest.mark.parametrize("size", [1e15, 1e17, 1e19, 1e25])
def test_gradients_whose_squares_leave_the_range_change_nothing(size: float) -> None:
    """Sums of squares of late gradients leave float32 before a square does."""

    def scaled(g: Any, size: float) -> Any:
        return mapped(lambda x: np.float32(size) * x.astype(np.float32), g)

    optimizer, large = Optimizer(LAYERS), 6
    data = [(scaled(g, size), scaled(rows, 1.0)) for g, rows in steps(large)]
    start = mapped(lambda x: x.astype(np.float32), params())
    with np.errstate(all="ignore"):
        p, state = train(optimizer, data, start)
    unchanged = all(np.array_equal(a, b) for a, b in zip(leaves(p), leaves(start), strict=True))
    assert (unchanged, int(state.skipped)) == ((False, 0) if size < 1e16 else (True, large))
    g, _ = steps(1, seed=2)[0]
    updates, new = optimizer.update(scaled(g, 1.0), state, p)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves(updates))
    assert new.skipped == state.skipped


@pytest.mark.parametrize("case", GIVEN)
def test_the_order_of_rows_does_not_matter(case: str) -> None:
    data, order = steps(4), np.random.default_rng(2).permutation(7)
    shuffled = [(g, mapped(lambda x: x[order], rows)) for g, rows in data]
    ours, _ = train(Optimizer(LAYERS, **GIVEN[case]), shuffled, params())
    expected, _ = train(Optimizer(LAYERS, **GIVEN[case]), data, params())
    assert_alike(ours, expected)


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_sums_of_micro_batches_are_those_of_the_batch(kfac_approx: str, case: str) -> None:
    optimizer = Optimizer(LAYERS, kfac_approx=kfac_approx, **GIVEN[case])
    p, state = train(optimizer, steps(2), params())
    _, rows = steps(1, seed=5)[0]
    whole = optimizer.curvature(rows, state, p)
    for name, (x, g) in rows.items():
        factors, kind = state.layers[name].factors, LAYERS[name]
        bias, total = isinstance(p[name], tuple), None
        for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
            A, N = kind.inputs(x[part], bias=bias, kfac_approx=kfac_approx)
            B, M = kind.outputs(g[part], kfac_approx=kfac_approx, loss_average="batch")
            inputs, outputs = factors.measure(A, B)
            new = [inputs, N, outputs, M]
            total = new if total is None else [a + b for a, b in zip(total, new, strict=True)]
        pairs = zip(Curvature.of(*total).named_arrays(), whole[name].named_arrays(), strict=True)
        for (key, a), (_, b) in pairs:
            np.testing.assert_allclose(a, b, rtol=CLOSE, atol=CLOSE, err_msg=f"{name} {key}")


def test_curvature_may_be_given_in_place_of_rows() -> None:
    optimizer = Optimizer(LAYERS)
    p, state = train(optimizer, steps(1), params())
    g, rows = steps(2)[1]
    found = optimizer.curvature(rows, state, p)
    ours, _ = optimizer.update(g, state, p, curvature=found)
    expected, _ = optimizer.update(g, state, p, rows)
    assert all(map(np.array_equal, leaves(ours), leaves(expected)))


def test_layers_without_rows_keep_their_factors() -> None:
    optimizer = Optimizer(LAYERS)
    p, state = train(optimizer, steps(2), params())
    g, rows = steps(3)[2]
    _, new = optimizer.update(g, state, p, {"map": rows["map"]})
    assert new.layers["head"].factors is not None
    for name, layer in new.layers.items():
        pairs = zip(
            layer.factors.named_arrays(), state.layers[name].factors.named_arrays(), strict=True
        )
        same = all(np.array_equal(a, b) for (n, a), (_, b) in pairs if "levels" not in n)
        assert same == (name not in ("map", "experts"))  # which has none ever


def test_due_is_every_T_steps() -> None:
    optimizer = Optimizer(LAYERS, T=3, growing_T=False)
    p, found = params(), []
    state = optimizer.init(p)
    for g, rows in steps(7):
        found.append(optimizer.due(state))
        _, state = optimizer.update(g, state, p, rows if found[-1] else None)
    assert found == [True, False, False, True, False, False, True]


def test_lr_cov_may_be_a_function_of_the_step() -> None:
    seen = []

    def lr_cov(step: int) -> float:
        seen.append(step)
        return 0.1 / (1 + step)

    train(Optimizer(LAYERS, lr_cov=lr_cov, recipe="paper", T=1), steps(3), params())
    assert sorted(set(seen)) == [0, 1, 2]


def test_tuples_and_matrices_are_layers_unless_said_otherwise() -> None:
    state = Optimizer().init({name: params()[name] for name in ("map", "head", "vector", "number")})
    assert set(state.layers) == {"map", "head"}
    assert set(state.fallback) == {"vector", "number"}
    assert not any(isinstance(layer.factors, Shampoo) for layer in state.layers.values())


def test_what_is_no_layer_learns_from_gradients_or_by_adamw() -> None:
    shapes = {"map": (2, 2), "other": (2, 2), "kernel": (3, 2, 2, 2), "vector": (3,), "no": (0, 2)}
    given = {name: np.ones(shape) for name, shape in shapes.items()}
    given["complex"] = 1j * np.ones((2, 2))
    state = Optimizer({"map": Linear()}).init(given)
    by_gradients = {n for n, one in state.layers.items() if isinstance(one.factors, Shampoo)}
    assert by_gradients == {"other", "kernel"}
    assert set(state.layers) == {"map", *by_gradients}
    for other in ({"recipe": "paper"}, {"kfac": True}):
        assert set(Optimizer({"map": Linear()}, **other).init(given).layers) == {"map"}


@pytest.mark.parametrize("i", [0.0, 1j], ids=["real", "complex"])
def test_fallback_is_adamw(i: complex) -> None:
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, written out."""
    s = Fallback(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    optimizer = Optimizer({}, fallback=s, warmup=0)
    rng = np.random.default_rng(0)
    w = theta = rng.standard_normal(4) + i * rng.standard_normal(4)
    state, m, v = optimizer.init({"w": w}), 0.0, 0.0
    for t in range(1, 6):
        g = rng.standard_normal(4) + i * rng.standard_normal(4)
        updates, state = optimizer.update({"w": g}, state, {"w": w})
        w = w + updates["w"]
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * abs(g) ** 2
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        theta = theta - 0.1 * (step + 0.2 * theta)
        np.testing.assert_allclose(w, theta, rtol=CLOSE)


def test_a_warm_up_is_of_adamw_too() -> None:
    p, g = {"vector": np.zeros(4)}, {"vector": np.ones(4)}
    changes = []
    for warmup in (0, 10):
        optimizer = Optimizer({}, warmup=warmup)
        changes.append(optimizer.update(g, optimizer.init(p), p)[0]["vector"])
    np.testing.assert_allclose(changes[1], 0.1 * changes[0])


def test_only_numpy_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; sys.modules |= dict.fromkeys(['torch', 'jax', 'cupy', 'scipy'])\n"
        "from singd_core import Optimizer\n"
        "o = Optimizer(); p = {'w': np.ones((2, 3))}; s = o.init(p)\n"
        "u, s = o.update(p, s, p, {'w': (np.ones((4, 3)), np.ones((4, 2)))}); print(s.step)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
