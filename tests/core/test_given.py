"""What the pure optimizer is given: sizes of zero, complex numbers, infinities, and mistakes."""

from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend

from singd_core import (
    Convolution,
    Embedding,
    Linear,
    Optimizer,
    StackedLinear,
    TransposedConvolution,
    check,
    flatten,
    unflatten,
)

GIVEN: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "normalize_lr_cov": True},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:1,1", "blockdiagonal:2")},
}
EAGER = [b for b in BACKENDS if b.library != "jax"]  # there each new operation compiles


def steps(optimizer: Optimizer, params: Any, grads: Any, rows: Any, n: int = 3) -> Any:
    state = optimizer.init(params)
    for _ in range(n):
        given = rows if optimizer.due(state) else None
        updates, state = optimizer.update(grads, state, params, given)
        params = optimizer.apply(params, updates)
    return params, state


# ---- sizes of zero -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("d_out", "d_in"), [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("backend", EAGER, ids=str)
def test_a_layer_without_inputs_or_outputs_leaves_the_others_alone(
    backend: Backend, d_out: int, d_in: int, bias: bool, case: str
) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((8, d_in)), rng.standard_normal((8, d_out))
    other, z = rng.standard_normal((8, 2)), rng.standard_normal((8, 2))
    with backend.active():

        def to(*arrays: np.ndarray) -> Any:
            return tuple(backend.to(a, "float32") for a in arrays)

        weight, *bias_of = to(np.ones((d_out, d_in)), *([np.ones(d_out)] if bias else []))
        grad, *bias_grad = to(g.T @ x, *([g.sum(0)] if bias else []))
        params = {"empty": (weight, *bias_of) if bias else weight, "other": to(np.ones((2, 2)))[0]}
        grads = {"empty": (grad, *bias_grad) if bias else grad, "other": to(z.T @ other)[0]}
        rows = {"empty": to(x, g), "other": to(other, z)}
        params, state = steps(Optimizer(**GIVEN[case]), params, grads, rows)
        alone, _ = steps(
            Optimizer(**GIVEN[case]),
            {"other": to(np.ones((2, 2)))[0]},
            {"other": grads["other"]},
            {"other": rows["other"]},
        )
        assert float(backend.back(state.skipped)) == 0
        np.testing.assert_array_equal(*(backend.back(p["other"]) for p in (params, alone)))
        if bias and d_out:  # the bias of a layer without inputs is trained
            moved = backend.back(params["empty"][1])
            assert np.all(np.isfinite(moved))
            assert np.all(moved != 1.0)


# ---- complex numbers ---------------------------------------------------------------------------


def test_a_complex_matrix_is_trained_by_adamw() -> None:
    weight = np.ones((3, 2)) + 1j
    state = Optimizer().init({"w": weight, "real": np.ones((3, 2))})
    assert (set(state.layers), set(state.fallback)) == ({"real"}, {"w"})
    with pytest.raises(ValueError, match=r"'w': AdamW trains it; the layers are \['real'\]"):
        Optimizer().curvature(
            {"w": (np.ones((4, 2)), np.ones((4, 3)))}, state, {"w": weight, "real": np.ones((3, 2))}
        )


@pytest.mark.parametrize("layers", [None, {"w": Linear()}], ids=["found", "named"])
def test_a_complex_layer_is_an_error(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"'w' is complex, and Linear.* is a real layer"):
        Optimizer(layers).init({"w": (np.ones((3, 2)) + 0j, np.ones(3) + 0j)})


# ---- infinities --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EAGER, ids=str)
@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("where", ["input", "output"])
def test_an_infinity_in_the_first_rows_skips_the_step(
    where: str, case: str, backend: Backend
) -> None:
    x, g = np.ones((8, 5)), np.ones((8, 3))
    bad = (np.where(x > 0.0, np.inf, x), g) if where == "input" else (x, np.where(g > 0, np.inf, g))
    with backend.active(), np.errstate(all="ignore"):
        params = {"w": backend.to(np.ones((3, 5)), "float32")}
        grads = {"w": backend.to(g.T @ x, "float32")}
        optimizer = Optimizer(**GIVEN[case])
        state = optimizer.init(params)
        rows = {"w": tuple(backend.to(a, "float32") for a in bad)}
        updates, new = optimizer.update(grads, state, params, rows)
        assert float(backend.back(new.skipped)) == 1
        assert not np.any(backend.back(updates["w"]))
        for (name, a), (_, b) in zip(new.named_arrays(), state.named_arrays(), strict=True):
            assert name == "skipped" or np.array_equal(backend.back(a), backend.back(b)), name


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_matrix_without_an_inverse_skips_the_step_of_its_layer(
    groups: int, backend: Backend
) -> None:
    """Equal inputs have a curvature of rank one; two groups of one channel are invertible."""
    layers = {"w": Convolution((1,), groups=groups), "v": Linear()}
    optimizer = Optimizer(layers, recipe="paper", kfac=True, lr_cov=1.0, damping=0.0)
    with backend.active(), np.errstate(all="ignore"):

        def to(*shape: int) -> Any:
            return backend.to(np.ones(shape), "float32")

        params = {"w": to(2, 2 // groups, 1), "v": to(2, 2)}
        state = optimizer.init(params)
        updates, new = optimizer.update(params, state, params, {"w": (to(8, 2, 1), to(8, 2, 1))})
        assert float(backend.back(new.skipped)) == (groups == 1)
        assert np.any(backend.back(updates["w"])) == (groups == 2)
        assert np.any(backend.back(updates["v"]))
        own, before = (dict(each.layers["w"].named_arrays()) for each in (new, state))
        for name, a in own.items():
            kept = np.array_equal(backend.back(a), backend.back(before[name]))
            assert kept or groups == 2, name


# ---- the range of 16 bits ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in EAGER if "float16" in b.dtypes], ids=str)
@pytest.mark.parametrize("case", ["normalized", "diagonal"])
def test_gradients_whose_squares_leave_float16_move_the_weight(case: str, backend: Backend) -> None:
    """300² is beyond 65504, the largest number of float16: the sums are float32's."""
    rng = np.random.default_rng(0)
    grad = 300.0 * np.sign(rng.standard_normal((4, 3)))
    x, g = 300.0 * np.sign(rng.standard_normal((8, 3))), np.sign(rng.standard_normal((8, 4))) / 8
    found = []
    with backend.active():
        for dtype in ("float16", "float32"):
            params = {"w": backend.to(np.ones((4, 3)), dtype), "v": backend.to(np.ones(5), dtype)}
            grads = {"w": backend.to(grad, dtype), "v": backend.to(np.full(5, 300.0), dtype)}
            rows = {"w": (backend.to(x, dtype), backend.to(g, dtype))}
            optimizer = Optimizer(**GIVEN[case], rounding="nearest")
            updates, state = optimizer.update(grads, optimizer.init(params), params, rows)
            assert float(backend.back(state.skipped)) == 0
            assert all(str(m.dtype).endswith("float32") for m in state.layers["w"].momenta or ())
            found.append(backend.back(updates["w"]))
    # the change is stored with 11 bits
    np.testing.assert_allclose(*found, rtol=2.0**-9, atol=2.0**-9 * np.max(np.abs(found[1])))


# ---- what a state shares -----------------------------------------------------------------------


def test_a_state_shares_no_memory_with_what_it_was_read_from() -> None:
    optimizer, params = Optimizer(), {"w": np.ones((3, 2)), "v": np.ones(2)}
    state = optimizer.init(params)
    flat = {name: np.array(a) for name, a in flatten(state).items()}
    new = unflatten(state, flat)
    before = [np.array(a) for _, a in new.named_arrays()]
    for a in flat.values():
        a += 1
    for (name, a), old in zip(new.named_arrays(), before, strict=True):
        assert np.array_equal(a, old), name


HOLES: dict[str, tuple[dict[str, Any], str]] = {
    "a factor that is NaN": (
        {"w.K.matrix": np.full((2, 2), np.nan)},
        r"'w\.K\.matrix' is not finite",
    ),
    "an infinite moment": ({"v.exp_avg": np.full(2, np.inf)}, r"'v\.exp_avg' is not finite"),
    "a factor of integers": ({"w.K.matrix": np.eye(2, dtype=int)}, r"'w\.K\.matrix' is of .*int64"),
    "a complex factor": ({"w.K.matrix": np.eye(2) * 1j}, r"'w\.K\.matrix' is of .*complex128"),
    "a count of fractions": ({"skipped": np.asarray(0.5)}, r"'skipped' is of .*float64"),
    "a rate below 0": ({"largest_lr": -1.0}, r"'largest_lr' is -1\.0 in the saved state: must be"),
    "half a step": (
        {"step": 3.5},
        r"'step' is 3\.5 in the saved state: must be at least 0 and whole",
    ),
    "a step that is no number": ({"step": np.nan}, r"'step' is nan in the saved state: must be"),
    "two steps": ({"step": np.array([3, 4])}, r"'step' is \[3 4\] in the saved state: must be"),
    "a step below 0": ({"step": -1}, r"'step' is -1 in the saved state: must be at least 0"),
}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("backend", EAGER, ids=str)
def test_a_saved_state_with_a_hole_is_named(backend: Backend, hole: str) -> None:
    damage, message = HOLES[hole]
    with backend.active():
        params = {"w": np.ones((3, 2)), "v": np.ones(2)}
        state = Optimizer().init({n: backend.to(p, "float32") for n, p in params.items()})
        unflatten(state, flatten(state))
        with pytest.raises(ValueError, match=message):
            unflatten(state, flatten(state) | damage)


# ---- mistakes ----------------------------------------------------------------------------------

W, B = np.zeros((4, 3)), np.zeros(4)
X, G = np.ones((8, 3)), np.ones((8, 4))


class Experts(Linear):
    """Matrices of an own kind, each with a bias."""

    def shape(self, weight_shape: Any, bias: bool) -> Any:
        experts, d_out, d_in = weight_shape
        return (experts,), d_out, d_in + bias


def test_the_biases_of_several_matrices_have_their_axes() -> None:
    p = {"a": (np.zeros((2, 4, 3)), np.zeros((2, 4)))}
    optimizer = Optimizer({"a": Experts()})
    updates, _ = optimizer.update(p, optimizer.init(p), p)
    assert [part.shape for part in updates["a"]] == [(2, 4, 3), (2, 4)]


@pytest.mark.parametrize(
    ("parameter", "layers", "error", "message"),
    [
        ([W, B], None, TypeError, r"'a' must be an array or a tuple \(weight, bias\), not a list"),
        (None, None, TypeError, "'a' must be an array or a tuple .*, not None"),
        ((W, B, B), None, TypeError, "'a' must be an array or .*, not a tuple of 3"),
        ((W, None), None, TypeError, "'a' must be an array or .*, not a tuple of 2"),
        ((W,), None, TypeError, "'a' must be an array or .*, not a tuple of 1"),
        ((), None, TypeError, "'a' must be an array or .*, not a tuple of 0"),
        (
            (W, B[:3]),
            None,
            ValueError,
            r"'a': the bias has shape \(3,\), but .* 4 outputs",
        ),
        (
            (W, B.reshape(2, 2)),
            None,
            ValueError,
            r"'a': the bias has shape \(2, 2\), but .* 4 outputs along one axis",
        ),
        ((B, B), None, ValueError, r"'a': Linear.* a weight of 2 axes, not of shape \(4,\)"),
        ((W[..., None], B), None, ValueError, r"'a': Linear.* not of shape \(4, 3, 1\)"),
        (B, Linear(), ValueError, r"'a': Linear.* not of shape \(4,\)"),
        (B, Embedding(4), ValueError, r"'a': Embedding.* not of shape \(4,\)"),
        (B, StackedLinear(2), ValueError, r"'a': StackedLinear.* not of shape \(4,\)"),
        (W, Convolution((1,)), ValueError, r"'a': Convolution.* 3 axes, not of shape \(4, 3\)"),
        (
            (W, B[:3]),
            Embedding(4),
            ValueError,
            "'a': Embedding.* has no bias: give the bias a name",
        ),
        (
            (W[None], B[None]),
            StackedLinear(1, apart=True),
            ValueError,
            "'a': StackedLinear.* has no bias: give the bias a name of its own",
        ),
        (
            (W[..., None], B[:3]),
            TransposedConvolution((1,)),
            ValueError,
            "'a': the bias of a transposed convolution .*: give the bias a name of its own",
        ),
        (W, StackedLinear(3), ValueError, r"'a': StackedLinear.* \(4, 3\) into 3 equal matrices"),
        (
            W[None],
            StackedLinear(2, apart=True),
            ValueError,
            "'a': StackedLinear.* 2 equal matrices",
        ),
        (
            W[..., None],
            Convolution((1,), groups=3),
            ValueError,
            "'a': Convolution.* 3 equal matrices",
        ),
        (
            W[..., None],
            TransposedConvolution((1,), groups=3),
            ValueError,
            "'a': Transposed.* 3 equal matrices",
        ),
        (W[..., None], Convolution((3,)), ValueError, "'a': Convolution.*: check kernel_size"),
        (W[..., None], TransposedConvolution((3,)), ValueError, "'a': Trans.*: check kernel_size"),
        (
            W,
            Embedding(5),
            ValueError,
            r"'a': Emb.* no table of shape \(4, 3\): check entries",
        ),
        (W, Embedding(4, 4), ValueError, "'a': Embedding.* no such padding: give an entry from 0"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(
    parameter: Any, layers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Optimizer(None if layers is None else {"a": layers}).init({"a": parameter})


def test_names_of_the_same_text_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the names 0 and '0', which are one in a saved state"):
        Optimizer({}).init({0: W, "0": W})


MISFITS: list[tuple[Any, Any, type[Exception], str]] = [
    ([W, B], None, TypeError, "the gradient of 'a' must be an array or a tuple .* a list of 2"),
    (None, None, TypeError, "the gradient of 'a' must be .*, not None"),
    ((W, B), {"a": None}, TypeError, "rows of 'a' must be a pair.* not None; a layer without"),
    ((W, B), {"a": np.ones((5, 3))}, TypeError, "rows of 'a' must be a pair.* not a ndarray"),
    ((W, B), {"b": (W, W)}, ValueError, r"rows of 'b': no such layer; the layers are \['a'\]"),
    ((W, B), [(W, W)], TypeError, "rows must be a dictionary by name, not a list of 1"),
    ((W, B), {"a": ([B], W)}, TypeError, "rows of 'a': its input must be an array, not a list"),
    ((W, B), {"a": (W, W * 1j)}, ValueError, "rows of 'a': its output gradient is complex"),
    ((W * 1j, B), None, ValueError, "the gradient of 'a' is of complex128, .*: cast it"),
    ((W.astype(int), B), None, ValueError, "the gradient of 'a' is of int64, .*: cast it"),
    ((W, B), {"a": (X[:, :1], G)}, ValueError, "rows of 'a': 8 of length 2 and 8 .* do not fit"),
    ((W, B), {"a": (X, G[:, :1])}, ValueError, "rows of 'a': 8 of length 4 and 8 .* do not fit"),
    ((W, B), {"a": (G, X)}, ValueError, "rows of 'a': 8 of length 5 and 8 of .* do not fit"),
    ((W, B), {"a": (X[:7], G)}, ValueError, "rows of 'a': 7 of length 4 and 8 .* do not fit"),
]


@pytest.mark.parametrize("by", ["update", "check"])
@pytest.mark.parametrize(("grad", "rows", "error", "message"), MISFITS)
def test_gradients_and_rows_that_do_not_fit_are_named(
    grad: Any, rows: Any, error: type[Exception], message: str, by: str
) -> None:
    optimizer, params, grads = Optimizer(), {"a": (W, B)}, {"a": grad}
    state = optimizer.init(params)
    calls: dict[str, Any] = {
        "update": lambda: optimizer.update(grads, state, params, rows),
        "check": lambda: check(grads, params, {} if rows is None else rows),
    }
    with pytest.raises(error, match=message):
        calls[by]()


def test_what_is_missing_is_named() -> None:
    optimizer, params, rows = Optimizer(), {"a": (W, B)}, {"a": (X, G)}
    state = optimizer.init(params)
    message = r"gradients and parameters .* \['a'\] in only one"
    with pytest.raises(ValueError, match=message):
        check({}, params, rows)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh_by_gradients(state, {}, params)
    with pytest.raises(ValueError, match=r"rows of 'a': no such layer; the layers are \[\]"):
        optimizer.curvature(rows, state, {})


# ---- `check` -----------------------------------------------------------------------------------


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, g, images, h = (
        rng.standard_normal(shape) for shape in ((8, 3), (8, 4), (8, 2, 5), (8, 4, 5))
    )
    conv = Convolution((3,), padding=1)
    A, _ = conv.inputs(images, bias=True, kfac_approx="expand")
    rows_of_h, _ = conv.outputs(h, kfac_approx="expand", loss_average=None)
    kernel = conv.split(rows_of_h.T @ A, (4, 2, 3), True)
    grads = {"map": (g.T @ x, g.sum(0)), "conv": kernel, "vector": np.ones(3)}
    params = {n: tuple(map(np.zeros_like, p)) for n, p in grads.items() if n != "vector"}
    rows = {"map": (x, g), "conv": (images, h)}
    return grads, params | {"vector": np.ones(3)}, rows


LAYERS = {"map": Linear(), "conv": Convolution((3,), padding=1)}


def test_rows_multiply_to_the_gradient() -> None:
    found = check(*problem(), LAYERS)
    assert set(found) == {"map", "conv"}
    assert max(found.values()) < 1e-12


def test_rows_that_do_not_are_named_with_the_factor_that_is_missing() -> None:
    grads, params, rows = problem()
    x, g = rows["map"]
    with pytest.raises(ValueError, match=r"'map' \(off by 0\.875; right if .* multiplied by 8\)"):
        check(grads, params, rows | {"map": (x, g / 8)}, LAYERS)
    with pytest.raises(ValueError, match=r"gradient: 'map' \(off by [\d.]+\)$"):
        check(grads, params, rows | {"map": (x[::-1], g)}, LAYERS)
    with pytest.raises(ValueError, match="rows of 'vector': no such layer"):
        check(grads, params, {"vector": (x, g)}, LAYERS)


@pytest.mark.parametrize(("index", "found"), [(-1, "from -1 to 1"), (5, "from 0 to 5")])
def test_an_index_that_is_none_of_its_table_is_named(index: int, found: str) -> None:
    grads, x, g = {"e": np.zeros((5, 4))}, np.array([0, 1, index]), np.ones((3, 4))
    assert check(grads, grads, {"e": (x % 5, g)}, {"e": Embedding(5)}) == {}
    with pytest.raises(ValueError, match=f"rows of 'e': its indices are {found}, and the"):
        check(grads, grads, {"e": (x, g)}, {"e": Embedding(5)})


def test_what_is_exported_is_what_pages_tell_to_use() -> None:
    import singd_core

    assert {"Embedding", "StackedLinear", "LayerKind", "flatten", "check", "rules"} <= set(
        singd_core.__all__
    )
    state = Optimizer().init({"w": W})
    assert "w.K.matrix" in flatten(state)
