"""What the pure optimizer promises besides its equations."""

from typing import Any

import numpy as np
import pytest
from optimizer_cases import LAYERS, leaves, mapped, params, steps, train

from singd_core import Fallback, Linear, Optimizer, Settings
from singd_core.curvature import Curvature
from singd_core.layers import Embedding
from singd_core.rules.shampoo import Shampoo

GIVEN: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "damping": 0.1},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:1,1", "hierarchical:1,1")},
}

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


# ---- bad input ---------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def test_indices_may_be_bytes() -> None:
    """As many entries as the dtype of the indices has values: one more would be none of them."""
    x = np.arange(256, dtype=np.uint8)[None]
    A, N = Embedding(256).inputs(x, bias=False, kfac_approx="expand")
    np.testing.assert_array_equal(A, np.ones((1, 256)))
    assert N == 256


def test_a_table_has_no_dense_factor_to_invert() -> None:
    with pytest.raises(ValueError, match=r"KFAC takes dense factors alone, and Embedding"):
        Optimizer({"e": Embedding(5)}, kfac=True).init({"e": np.zeros((5, 2))})


def test_parameters_without_names_are_an_error() -> None:
    with pytest.raises(TypeError, match="params must be a dictionary of arrays"):
        Optimizer().init([np.zeros(3)])  # type: ignore[arg-type]


def test_integers_are_named() -> None:
    with pytest.raises(ValueError, match="'n' is not of floating-point numbers"):
        Optimizer().init({"w": np.zeros((2, 2)), "n": np.arange(3)})


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="params is empty"):
        Optimizer().init({})


def test_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mop' is no parameter; there are"):
        Optimizer({"mop": Linear()}).init(params())


def test_a_bias_without_a_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="'map' has a bias but is no layer"):
        Optimizer({}).init(params())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "paperr"}, "recipe='paperr'"),
        ({"learning_rate": 1.0}, "no setting 'learning_rate'"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"structures": ("dense", "denser")}, r'structures\[1\] = there is no structure "denser"'),
        (
            {"structures": ("hierarchical:0,4", "dense")},
            r"structures\[0\] = .*k1 must be at least 1",
        ),
        (
            {"kfac": True, "structures": ("tril", "dense")},
            r'structures\[0\] = "tril": KFAC takes dense',
        ),
        ({"kfac_approx": "shrink"}, "kfac_approx = 'shrink'"),
        ({"loss_average": "mean"}, "loss_average = 'mean'"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(LAYERS, **given)


def broken(g: Any, rows: Any, case: str) -> tuple[Any, Any, str]:
    """Gradients, rows and the message that names what is wrong."""
    wrong: dict[str, tuple[Any, Any, str]] = {
        "missing": ({k: v for k, v in g.items() if k != "head"}, rows, r"\['head'\] in only one"),
        "left over": (g | {"tail": np.ones(2)}, rows, r"\['tail'\] in only one of them"),
        "shape": (g | {"head": g["head"].T}, rows, r"gradient of 'head' has shape \[\(5, 3\)\]"),
        "no bias": (g | {"map": g["map"][0]}, rows, r"gradient of 'map' has shape"),
        "rows of no layer": (g, rows | {"vector": rows["map"]}, r"'vector': AdamW trains it"),
        "too few features": (g, {"map": (rows["map"][0][:, :3], rows["map"][1])}, r"rows of 'map'"),
        "too few outputs": (g, {"map": (rows["map"][0], rows["map"][1][:, :3])}, r"rows of 'map'"),
        "unequal batches": (g, {"map": (rows["map"][0][:3], rows["map"][1])}, r"rows of 'map'"),
    }
    return wrong[case]


@pytest.mark.parametrize(
    "case",
    [
        "missing", "left over", "shape", "no bias", "rows of no layer", "too few features",
        "too few outputs", "unequal batches",
    ],
)  # fmt: skip
def test_names_and_shapes_that_do_not_fit_are_errors(case: str) -> None:
    optimizer, p = Optimizer(LAYERS), params()
    grads, rows, message = broken(*steps(1)[0], case)
    with pytest.raises(ValueError, match=message):
        optimizer.update(grads, optimizer.init(p), p, rows)


def poisoned(g: Any, rows: Any, where: str, value: float) -> tuple[Any, Any]:
    def one(x: np.ndarray) -> np.ndarray:
        x = np.array(x)
        x.reshape(-1)[-1] = value
        return x

    kind, name = where.split()
    if kind == "gradient":
        return g | {name: mapped(one, g[name])}, rows
    x, z = rows[name]
    return g, rows | {name: (one(x), z) if kind == "input" else (x, one(z))}


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(
    "where",
    [
        "gradient map", "gradient head", "gradient grouped", "gradient vector", "gradient number",
        "input map", "output head", "input grouped", "output grouped",
    ],
)  # fmt: skip
def test_what_is_not_finite_changes_nothing_and_is_counted(where: str, value: float) -> None:
    for given in GIVEN.values():
        optimizer = Optimizer(LAYERS, **given | {"T": 1})
        p, state = train(optimizer, steps(2), params())
        g, rows = steps(3)[2]
        with np.errstate(all="ignore"):
            bad_g, bad_rows = poisoned(g, rows, where, value)
            updates, new = optimizer.update(bad_g, state, p, bad_rows)
        assert all(not leaf.any() for leaf in leaves(updates))
        assert (new.step, new.skipped) == (3, 1)
        for (name, a), (_, b) in zip(new.named_arrays(), state.named_arrays(), strict=True):
            assert name == "skipped" or np.array_equal(a, b), name
        updates, new = optimizer.update(g, new, p, rows)
        assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves(updates))
        assert (new.step, new.skipped) == (4, 1)


@pytest.mark.parametrize("case", GIVEN)
def test_rows_of_zeros_destroy_nothing(case: str) -> None:
    """A dead layer, or one below a head that starts at zero, in the first step and later."""
    optimizer = Optimizer(LAYERS, **GIVEN[case])
    p = params()
    state = optimizer.init(p)
    data = steps(6)
    for i, (g, rows) in enumerate(data):
        if i in (0, 1, 4):
            g = g | {name: mapped(np.zeros_like, g[name]) for name in rows}
            rows = {name: (x * 0.0, z) if i == 1 else (x, z * 0.0) for name, (x, z) in rows.items()}
        updates, state = optimizer.update(g, state, p, rows if optimizer.due(state) else None)
        p = optimizer.apply(p, updates)
        assert state.skipped == 0
        assert all(np.isfinite(leaf).all() for leaf in leaves(p))
        assert all(np.isfinite(a).all() for _, a in state.named_arrays())


@pytest.mark.parametrize("case", GIVEN)
def test_an_empty_batch_destroys_nothing(case: str) -> None:
    optimizer = Optimizer(LAYERS, **GIVEN[case])
    p = params()
    state = optimizer.init(p)
    for n in (0, 7, 0, 7):
        (g, rows), *_ = steps(1, seed=n)
        g = mapped(lambda x, n=n: x * (n > 0), g)
        rows = mapped(lambda x, n=n: x[:n], rows)
        updates, state = optimizer.update(g, state, p, rows if optimizer.due(state) else None)
        p = optimizer.apply(p, updates)
    assert state.skipped == 0
    assert all(np.isfinite(leaf).all() for leaf in leaves(p))
    assert all(np.isfinite(a).all() for _, a in state.named_arrays())


def test_settings_are_those_given() -> None:
    assert Optimizer(recipe="paper").settings == Settings()
    assert Optimizer(lr=0.3).settings.lr == 0.3


def test_a_rate_of_adamw_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="the size of a step.* default is 0.12: leave") as seen:
        Optimizer(lr=1e-3)
    assert [w.filename for w in seen] == [__file__]
    for given in ({"recipe": "paper"}, {"normalized": False}):
        Optimizer(lr=1e-3, **given)  # a warning is an error here


def test_an_explicit_decay_of_zero_holds_for_what_adamw_trains() -> None:
    assert Optimizer(weight_decay=0.0).fallback.weight_decay == 0.0
    own = Fallback(weight_decay=0.2)
    assert Optimizer(weight_decay=0.0, fallback=own).fallback is own
    for given in ({}, {"weight_decay": 0.1}):
        assert Optimizer(**given).fallback.weight_decay == 0.01
