"""What is wrong, not finite or empty: errors that name it, and steps that change nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from optimizer_cases import GIVEN, LAYERS, leaves, mapped, params, steps, train

from singd_core import Fallback, Linear, Optimizer, Settings
from singd_core.layers import Convolution, Embedding, LayerKind, TransposedConvolution

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
    given = {"map": (np.ones((4, 3)), np.ones(5))}
    for how in ({}, {"recipe": "paper"}):
        with pytest.raises(ValueError, match="'map' has a bias but is no layer"):
            Optimizer({}, **how).init(given)
    with pytest.raises(ValueError, match="'map' has a bias but is no layer"):
        Optimizer({}, recipe="paper").init({"map": (np.ones((4, 3)), np.ones(4))})


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
        ({"fallback": Fallback(lr=-1.0)}, r"fallback\.lr=-1\.0: must be at least 0"),
        ({"fallback": Fallback(eps=None)}, r"fallback\.eps=None: must be a number"),  # type: ignore[arg-type]
        ({"fallback": Fallback(betas=None)}, r"fallback\.betas=None: give two numbers"),  # type: ignore[arg-type]
        (
            {"fallback": Fallback(betas=(0.9, 1.0))},
            r"fallback\.betas=1\.0: must be two in \[0, 1\)",
        ),
        ({"preconditioner_dtype": "float32"}, "preconditioner_dtype='float32': give two, one for"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(LAYERS, **given)


def test_what_is_no_kind_and_no_fallback_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="layers must be a dictionary by name, not a list of 1"):
        Optimizer(["map"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layers\['map'\] = .*: give a kind of layer, e.g. Linear"):
        Optimizer({"map": Linear})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"fallback=.*: give Fallback\(lr=...\)"):
        Optimizer(fallback={"lr": 0.1})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["preconditioner_dtype", "momentum_dtype"])
@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_state_is_of_real_floating_point_numbers(name: str, dtype: Any) -> None:
    given = dtype if name == "momentum_dtype" else (None, dtype)
    with pytest.raises(ValueError, match=f"{name} is {np.dtype(dtype)}: give a dtype of real"):
        Optimizer(LAYERS, **{name: given}).init(params())


@pytest.mark.parametrize("name", ["preconditioner_dtype", "momentum_dtype"])
def test_float16_holds_no_state_of_a_layer(name: str) -> None:
    """Gradients of 1e-4 or of 1e4 left its range: no step, or one without a change."""
    given = np.float16 if name == "momentum_dtype" else (np.float16, None)
    with pytest.raises(ValueError, match=f"{name} is float16, .*: give bfloat16, float32 or None"):
        Optimizer(LAYERS, **{name: given}).init(params())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_entry_without_gradients_stays_where_epsilon_is_0(dtype: Any) -> None:
    """0 / 0 in AdamW. A gradient whose square is 0 moves it by no more than the rate."""
    params = {"v": np.ones(3, dtype)}
    optimizer = Optimizer(fallback=Fallback(eps=0.0, weight_decay=0.0, lr=0.1), warmup=0)
    state = optimizer.init(params)
    small = 1e-7 if dtype is np.float16 else 1e-30
    for _ in range(3):
        grads = {"v": np.array([0.0, small, 1.0], dtype)}
        updates, state = optimizer.update(grads, state, params)
        assert updates["v"][0] == 0.0
        assert np.all(np.abs(updates["v"]) <= dtype(0.101))
        np.testing.assert_allclose(updates["v"][2], -0.1, rtol=2.0**-7)  # float16 near 1


RATES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lr": lambda rate: {"lr": rate},
    "momentum": lambda rate: {"momentum": rate},
    "weight_decay": lambda rate: {"weight_decay": rate},
    "lr_cov": lambda rate: {"lr_cov": rate},
    "damping": lambda rate: {"damping": rate},
    "alpha1": lambda rate: {"alpha1": rate},
    "factor_bound": lambda rate: {"factor_bound": rate},
    "lr of AdamW": lambda rate: {"fallback": Fallback(lr=rate)},
    "betas of AdamW": lambda rate: {"fallback": Fallback(betas=(0.9, rate))},
    "eps of AdamW": lambda rate: {"fallback": Fallback(eps=rate)},
    "weight_decay of AdamW": lambda rate: {"fallback": Fallback(weight_decay=rate)},
}


@pytest.mark.parametrize("recipe", ["paper", "normalized"])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", RATES)
def test_a_rate_that_is_not_finite_changes_nothing_and_is_counted(
    name: str, value: float, recipe: str
) -> None:
    if (name, value) == ("factor_bound", INF):
        pytest.skip("a bound may be infinite")
    rate = np.array(0.01)
    optimizer = Optimizer(LAYERS, recipe=recipe, **RATES[name](rate))
    p, state = train(optimizer, steps(2), params())
    g, _ = steps(3)[2]
    rate[...] = value
    with np.errstate(all="ignore"):
        updates, new = optimizer.update(g, state, p)
    assert all(not leaf.any() for leaf in leaves(updates))
    assert (new.step, new.skipped) == (3, 1)
    for (key, a), (_, b) in zip(new.named_arrays(), state.named_arrays(), strict=True):
        assert key == "skipped" or np.array_equal(a, b), key
    rate[...] = 0.01
    updates, new = optimizer.update(g, new, p)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves(updates))
    assert (new.step, new.skipped) == (4, 1)


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


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("kind", "weight", "x", "g"),
    [
        (Linear(), (4, 3), (8, 5, 3), (8, 7, 4)),
        (Convolution((3, 3)), (4, 3, 3, 3), (2, 3, 10, 10), (2, 4, 6, 6)),
        (TransposedConvolution((2, 2), 2), (3, 4, 2, 2), (2, 3, 10, 10), (2, 4, 10, 10)),
    ],
    ids=["linear", "convolution", "transposed"],
)
def test_positions_of_both_sides_are_as_many(
    kind: LayerKind, weight: Any, x: Any, g: Any, kfac_approx: str
) -> None:
    """As of a kind with another padding or stride than the layer."""
    optimizer = Optimizer({"map": kind}, kfac_approx=kfac_approx)
    p = {"map": np.ones(weight)}
    with pytest.raises(ValueError, match=r"rows of 'map': .* fit a"):
        optimizer.curvature({"map": (np.ones(x), np.ones(g))}, optimizer.init(p), p)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_no_positions_are_no_rows(kfac_approx: str) -> None:
    """Their mean would be NaN, and every step left out."""
    optimizer, p = Optimizer({"map": Linear()}, kfac_approx=kfac_approx), {"map": np.ones((4, 3))}
    rows = {"map": (np.ones((8, 0, 3)), np.ones((8, 0, 4)))}
    updates, state = optimizer.update({"map": np.ones((4, 3))}, optimizer.init(p), p, rows)
    assert int(state.skipped) == 0
    assert np.all(np.isfinite(updates["map"]))


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


def test_products_out_of_range_stop_their_layer_alone() -> None:
    optimizer = Optimizer(LAYERS, structures="dense")
    p, state = train(optimizer, steps(1), params())
    layer = state.layers["map"]
    huge = layer.factors.C.map(lambda a: np.full_like(a, 1e308))
    factors = dataclasses.replace(layer.factors, C=huge)
    layers = state.layers | {"map": dataclasses.replace(layer, factors=factors)}
    state = dataclasses.replace(state, layers=layers)
    with np.errstate(all="ignore"):
        updates, new = optimizer.update(steps(2)[1][0], state, p)
    assert {name for name, u in updates.items() if not all(np.any(a) for a in leaves(u))} == {"map"}
    assert not any(np.any(a) for a in leaves(updates["map"]))
    assert new.skipped == 1
    pairs = zip(layers["map"].named_arrays(), new.layers["map"].named_arrays(), strict=True)
    for (key, a), (_, b) in pairs:
        assert np.array_equal(a, b), key


def test_a_bias_that_is_no_column_and_not_finite_stops_all() -> None:
    """Also in a step that refreshes nothing."""
    optimizer = Optimizer({}, T=2, growing_T=False)
    (first, _), (g, _) = steps(2)
    p, state = train(optimizer, [(first, None)], params())
    g["map"][1][1] = NAN
    with np.errstate(all="ignore"):
        updates, new = optimizer.update(g, state, p)
    assert not any(np.any(leaf) for leaf in leaves(updates))
    assert new.skipped == 1


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
    assert Optimizer(weight_decay=0.0, fallback=own).fallback.weight_decay == 0.2
    for given in ({}, {"weight_decay": 0.1}):
        assert Optimizer(**given).fallback.weight_decay == 0.01


@pytest.mark.parametrize(("recipe", "rate"), [("normalized", 0.01), ("paper", 0.001)])
def test_what_is_not_given_for_adamw_is_as_without(recipe: str, rate: float) -> None:
    for given in ({"weight_decay": 0.0}, {"eps": 1e-6}, {"betas": (0.8, 0.9)}, {}):
        found = Optimizer(recipe=recipe, fallback=Fallback(**given)).fallback
        expected = {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01} | given
        assert vars(found) == expected
    optimizer = Optimizer(weight_decay=0.0, fallback=Fallback(lr=0.5))
    assert optimizer.fallback.weight_decay == 0.0
    optimizer.fallback = Fallback(eps=1e-6)  # as a loop has a schedule
    assert (optimizer.fallback.lr, optimizer.fallback.weight_decay) == (0.01, 0.0)
