"""A state of other parameters, settings or libraries, and arrays that do not fit: errors."""

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
    flatten,
    unflatten,
)

W, B = np.zeros((4, 3)), np.zeros(4)
TORCH = [b for b in BACKENDS if b.library == "torch"]


@pytest.mark.parametrize("numpy_is", ["gradients", "rows", "state"])
@pytest.mark.parametrize("backend", TORCH, ids=str)
def test_arrays_of_two_libraries_are_named(backend: Backend, numpy_is: str) -> None:
    optimizer, x, g = Optimizer(), np.ones((8, 3)), np.ones((8, 4))
    given = {"params": {"a": W}, "gradients": {"a": g.T @ x}, "rows": {"a": (x, g)}}
    with backend.active():

        def to(a: np.ndarray) -> Any:
            return backend.to(a, "float32")

        params = {"a": to(W)}
        state = optimizer.init({"a": W} if numpy_is == "state" else params)
        grads = given["gradients"] if numpy_is == "gradients" else {"a": to(g.T @ x)}
        rows = given["rows"] if numpy_is == "rows" else {"a": (to(x), to(g))}
        with pytest.raises(TypeError, match=r"is a numpy.*, its parameter a torch"):
            optimizer.update(grads, state, params, rows)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({"a": (np.zeros((1, 1)), np.zeros(1))}, "'a' has another shape"),
        ({"a": W}, "'a' has another shape"),
        ({"v": np.zeros(())}, "'v' has another shape"),
        ({"a": B}, "'a' has no factors"),
        (Optimizer(momentum=0.0), "'a' has no momentum, and momentum=0.9 keeps one"),
        (Optimizer(recipe="paper", rule="ikfac"), "'a' has a momentum of another recipe"),
        (Optimizer(kfac=True), r"'a' has factors of KFAC, not of IKFAC \(rule='ikfac'\)"),
        (Optimizer(rule="singd"), r"'a' has factors of SINGD, not of IKFAC \(rule='ikfac'\)"),
        (
            Optimizer(structures="diagonal"),
            "'a' has the structures 'diagonal' and 'diagonal', not .*",
        ),
        (
            Optimizer(structures=("tril", "dense")),
            "'a' has the structures 'tril' and 'dense', not .*",
        ),
    ],
)
def test_a_state_of_other_shapes_or_settings_is_named(before: Any, message: str) -> None:
    params = {"a": (W, B), "v": B}
    made_by, of = (Optimizer(), params | before) if isinstance(before, dict) else (before, params)
    with pytest.raises(ValueError, match=f"the state of {message}.*: .*`init.params.` makes one"):
        Optimizer().update(params, made_by.init(of), params)


SINGD = {"rule": "singd", "alpha1": 0.5}
PAPER = {"recipe": "paper", "structures": None}
PAIRS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"momentum": 0.0}, "'a' has no momentum, and momentum=0.9 keeps one"),
    (
        SINGD,
        SINGD | {"alpha1": 0.0},
        "'a' has no Riemannian momentum, and alpha1=0.5, rule",
    ),
    ({"rounding": "kahan"}, {}, "'a' has no compensation, and rounding='kahan' keeps one"),
    ({}, {"rounding": "kahan"}, "'a' has a compensation, and rounding='stochastic' keeps none"),
    (PAPER | SINGD, SINGD, "'a' has a momentum of another recipe"),
    (
        PAPER | SINGD | {"momentum": 0.0},
        SINGD | {"momentum": 0.0},
        "'a' has levels, which are of another recipe",
    ),
]


@pytest.mark.parametrize(("given", "before", "message"), PAIRS)
@pytest.mark.parametrize("layers", [None, {}], ids=["rows", "gradients"])
def test_a_state_that_keeps_more_or_less_is_named(
    layers: Any, given: Any, before: Any, message: str
) -> None:
    params = {"a": np.zeros((4, 3), np.float16)}
    optimizer, other = Optimizer(layers, **given), Optimizer(layers, **before)
    if layers == {} and given.get("recipe") == "paper":
        message = "'a' is one of a layer"
    optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match=f"the state of {message}.*: .*`init.params.` makes one"):
        optimizer.update(params, other.init(params), params)


def test_a_momentum_may_be_0_for_a_while() -> None:
    """As a schedule may say; what is kept is then what a momentum of 0 keeps."""
    rng, params = np.random.default_rng(0), {"a": (W, B)}
    grads = {"a": (rng.standard_normal((4, 3)), rng.standard_normal(4))}
    with_both = Optimizer(**SINGD)
    _, state = with_both.update(grads, with_both.init(params), params)
    updates, _ = Optimizer(**SINGD | {"momentum": 0.0, "alpha1": 0.0}).update(grads, state, params)
    zero = {name: np.zeros(()) for name in ("momentum", "alpha1")}
    expected, _ = Optimizer(**SINGD | zero).update(grads, state, params)
    for ours, own in zip(updates["a"], expected["a"], strict=True):
        np.testing.assert_allclose(ours, own, rtol=1e-12)


def test_a_riemannian_momentum_of_another_rule_is_named() -> None:
    """Factors that learn from gradients are of one class under all rules."""
    state, params = Optimizer({}, **SINGD).init({"a": W}), {"a": W}
    with pytest.raises(ValueError, match=r"'a' has a Riem.* alpha1=0\.5, rule='ikfac' keeps no"):
        Optimizer({}, alpha1=0.5).update(params, state, params)


def test_a_compensation_of_adamw_is_named() -> None:
    params = {"v": np.zeros(4, np.float16)}
    with pytest.raises(ValueError, match="'v' has no compensation, and rounding='kahan' keeps one"):
        Optimizer(rounding="kahan").update(params, Optimizer().init(params), params)


@pytest.mark.parametrize("layers", [None, {}], ids=["rows", "gradients"])
def test_a_state_of_other_shapes_without_momentum_is_named(layers: Any) -> None:
    optimizer, shapes = Optimizer(layers, momentum=0.0), (W, (W, B), W[:3], W[:, :2])
    for own in shapes:
        for other in shapes:
            if other is own:
                continue
            with pytest.raises(ValueError, match="the state of 'a' has another shape"):
                optimizer.update({"a": own}, optimizer.init({"a": other}), {"a": own})


def test_factors_that_learn_from_gradients_take_no_rows() -> None:
    params, rows = {"a": W}, {"a": (np.ones((8, 3)), np.ones((8, 4)))}
    for state, optimizer in (({}, None), (None, {})):
        made = Optimizer(state).init(params)
        with pytest.raises(ValueError, match=r"'a'.*(learns from its gradient alone|wants rows)"):
            Optimizer(optimizer).update(params, made, params, rows if optimizer is None else None)


def test_what_is_no_state_and_changes_of_others_are_named() -> None:
    optimizer, params = Optimizer(), {"a": W, 0: B}
    state = optimizer.init(params)
    with pytest.raises(TypeError, match="the state is a dict: give what `init`"):
        optimizer.update(params, flatten(state), params)
    with pytest.raises(TypeError, match="the saved state must be a dictionary, not a State"):
        unflatten(state, state)
    with pytest.raises(TypeError, match="the state is a Optimizer: give what `init`"):
        unflatten(optimizer, flatten(state))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"changes and parameters .* \[0\] in only one"):
        optimizer.apply(params, {"a": W})
    with pytest.raises(ValueError, match="rows of 'b': no such layer"):
        optimizer.update(params, state, params, curvature={"b": None})


def test_what_no_method_has_made_is_named() -> None:
    optimizer, params = Optimizer(), {"a": (W, B), "v": B}
    state, rows = optimizer.init(params), {"a": (np.ones((8, 3)), np.ones((8, 4)))}
    with pytest.raises(TypeError, match="the state is a dict: give what `init`"):
        optimizer.due(flatten(state))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the state is a dict: give what `init`"):
        optimizer.curvature(rows, flatten(state), params)  # type: ignore[arg-type]
    curvature = optimizer.curvature(rows, state, params)
    with pytest.raises(TypeError, match="the state is None: give what `init`"):
        optimizer.refresh(None, curvature)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="curvature of 'a': give what `curvature` returned, not a"):
        optimizer.refresh(state, rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curvature of 'v': AdamW trains it"):
        optimizer.refresh(state, {"v": curvature["a"]})


def test_factors_of_no_layer_and_what_is_given_twice_are_errors() -> None:
    optimizer, params = Optimizer(), {"a": (W, B), "v": B}
    state, rows = optimizer.init(params), {"a": (np.ones((8, 3)), np.ones((8, 4)))}
    curvature = optimizer.curvature(rows, state, params)
    factors = optimizer.refresh(state, curvature)
    with pytest.raises(ValueError, match="refreshed factors of 'b': no such layer"):
        optimizer.update(params, state, params, refreshed={"b": factors["a"]})
    with pytest.raises(TypeError, match="factors of 'a': give what `refresh` returned, not a Curv"):
        optimizer.update(params, state, params, refreshed=curvature)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rows and curvature are given: give one of them"):
        optimizer.update(params, state, params, rows, curvature=curvature)
    with pytest.raises(TypeError, match="curvature and refreshed are given: give one of them"):
        optimizer.update(params, state, params, curvature=curvature, refreshed=factors)


def test_rows_in_a_step_that_is_not_due_refresh_the_factors_too() -> None:
    optimizer, params = Optimizer(T=10, growing_T=False), {"a": (W, B)}
    rows = {"a": (np.eye(8)[:, :3], np.eye(8)[:, :4])}
    _, state = optimizer.update(params, optimizer.init(params), params, rows)
    assert not optimizer.due(state)
    _, new = optimizer.update(params, state, params, rows)
    before, after = (own.layers["a"].factors.K.dense() for own in (state, new))
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("kind", "weight", "rows"),
    [
        (Linear(), (4, 3), ((8, 5, 3), (8, 7, 4))),
        (Linear(), (4, 3), ((8, 5, 3), (8, 4))),
        (Convolution((3,)), (4, 3, 3), ((8, 3, 6), (8, 4, 6))),  # a padding that is not told
        (TransposedConvolution((3,)), (3, 4, 3), ((8, 3, 6), (8, 4, 6))),
        (Embedding(9), (9, 4), ((8, 5), (8, 4))),
    ],
)
@pytest.mark.parametrize("most", [1, 256])
def test_positions_that_differ_are_seen_however_few_rows_are_taken(
    kind: Any, weight: Any, rows: Any, most: int
) -> None:
    optimizer, params = Optimizer({"a": kind}, rows=most), {"a": np.ones(weight)}
    x, g = (np.ones(shape) for shape in rows)
    x = x.astype(int) if isinstance(kind, Embedding) else x
    with pytest.raises(ValueError, match=r"rows of 'a': .* do not fit a .* and each other"):
        optimizer.curvature({"a": (x, g)}, optimizer.init(params), params)


def test_rows_of_parts_and_one_hot_rows_are_errors() -> None:
    x, g = np.ones((8, 3)), np.ones((8, 2))
    parts = Optimizer({"a": StackedLinear(2)})
    with pytest.raises(ValueError, match=r"'a': each part of StackedLinear.* a name and a kind of"):
        parts.curvature({"a": (x, g)}, parts.init({"a": W}), {"a": W})
    table, params = Optimizer({"a": Embedding(3)}), {"a": np.zeros((3, 2))}
    with pytest.raises(ValueError, match="'a': input x is of float64: an embedding takes indices"):
        table.curvature({"a": (x, g)}, table.init(params), params)


@pytest.mark.parametrize("made", [np.matrix, lambda a: np.ma.masked_array(a, a > 0.0)])
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_arrays_with_an_arithmetic_of_their_own_are_named(made: Any) -> None:
    """A mask would be lost on the way, and the products of matrices are others."""
    optimizer, params = Optimizer({}), {"a": np.eye(3)}
    state = optimizer.init(params)
    with pytest.raises(TypeError, match=r"a numpy.* arithmetic of its own: give plain arrays"):
        optimizer.update({"a": made(np.eye(3))}, state, params)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "triltoeplitz"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [Linear(), Convolution((2,))], ids=str)
def test_rows_of_bytes_are_the_numbers_that_they_are(
    kind: Any, kfac_approx: str, structure: str
) -> None:
    """Such as images: the square of a byte is none."""
    rng = np.random.default_rng(0)
    shape, inputs, outputs = (
        ((4, 3, 2), (8, 3, 6), (8, 4, 5))
        if isinstance(kind, Convolution)
        else ((4, 3), (8, 5, 3), (8, 5, 4))
    )
    x, g = rng.integers(0, 256, inputs).astype(np.uint8), rng.standard_normal(outputs)
    params = {"a": np.ones(shape)}
    optimizer = Optimizer({"a": kind}, structures=structure, kfac_approx=kfac_approx)
    state = optimizer.init(params)
    found, expected = (
        optimizer.curvature({"a": (rows, g)}, state, params)["a"] for rows in (x, x.astype(float))
    )
    for (name, a), (_, b) in zip(found.named_arrays(), expected.named_arrays(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


SINGLE: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "vector": (Linear(), (np.ones((4, 3)), B), (3,)),
    "image": (Convolution((2,)), (np.ones((4, 3, 2)), B), (3, 6)),
    "transposed": (TransposedConvolution((2,)), np.ones((3, 4, 2)), (3, 4)),
    "index": (Embedding(3), np.ones((3, 4)), ()),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_single_example_is_a_batch_of_one(case: str) -> None:
    (kind, parameter, shape), rng = SINGLE[case], np.random.default_rng(0)
    optimizer, params = Optimizer({"a": kind}), {"a": parameter}
    x = np.asarray(2) if case == "index" else rng.standard_normal(shape)
    g = rng.standard_normal((4, 5) if len(shape) == 2 else 4)
    state = optimizer.init(params)
    one, batch = (
        optimizer.curvature({"a": rows}, state, params)["a"]
        for rows in ((x, g), (x[None], g[None]))
    )
    for (name, a), (_, b) in zip(one.named_arrays(), batch.named_arrays(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_gradients_of_another_dtype_leave_the_state_in_its_own(dtype: Any) -> None:
    optimizer, params = (
        Optimizer(),
        {n: np.ones(s, np.float32) for n, s in (("a", (4, 3)), ("v", 5))},
    )
    state = optimizer.init(params)
    _, new = optimizer.update({n: p.astype(dtype) for n, p in params.items()}, state, params)
    for (name, a), (_, b) in zip(new.named_arrays(), state.named_arrays(), strict=True):
        assert a.dtype == b.dtype, name


def test_a_state_of_other_parameters_is_named() -> None:
    optimizer, other = Optimizer(), {"q": np.zeros((2, 2))}
    with pytest.raises(ValueError, match=r"the state and the parameters .* \['a', 'q'\] in only"):
        optimizer.update(other, optimizer.init({"a": (W, B)}), other)
