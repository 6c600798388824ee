"""The curvature of weights that are multiplied, indexed, padded or grouped before their product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_all_cases import CASES
from jax_cases import X, array, mean_square
from jax_weight_cases import SIZES

import singd_jax


def measured(loss, params, *batch, recipe="paper", **options):
    """U and G of each layer, which KFAC measures with K = C = I."""
    layers = singd_jax.find_layers(loss, **options)(params, *batch)
    tx = singd_jax.singd(layers=layers, kfac=True, T=1)
    _, _, curvature = singd_jax.value_and_curvature(loss, layers)(params, tx.init(params), *batch)
    return {k: (c.H_K.dense(), c.H_C.dense()) for k, c in curvature.items()}


def alike(got, expected):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # float32, sums of at most 60 products
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "multiple",
    [lambda w: w * 0.3, lambda w: 0.3 * w, lambda w: w / (1 / 0.3), lambda w: -(-0.3 * w)],
)
def test_a_factor_of_a_weight_is_one_of_its_inputs(multiple):
    def direct(p, x):
        return mean_square((0.3 * x) @ p["w"] + p["b"])

    def indirect(p, x):
        return mean_square(x @ multiple(p["w"]) + p["b"])

    params = {"w": array(4, 3), "b": array(3)}
    alike(measured(indirect, params, X), measured(direct, params, X))


def side_by_side(weights, biases, x):
    return x @ jnp.concatenate(weights, 1) + jnp.concatenate(biases)


def one_by_one(weights, biases, x):
    return jnp.concatenate([x @ w + b for w, b in zip(weights, biases, strict=True)], 1)


def one_above_the_other(weights, biases, x):
    return jnp.concatenate([x * 0.5, x], 1) @ jnp.concatenate(weights, 0)


def summed(weights, biases, x):
    return (x * 0.5) @ weights[0] + x @ weights[1]


@pytest.mark.parametrize(
    ("joined", "apart"), [(side_by_side, one_by_one), (one_above_the_other, summed)]
)
@pytest.mark.parametrize(
    "pieces",
    [
        lambda p: ([p["w"], p["w"]], [p["b"], p["b"]]),
        lambda p: ([p["w"], p["w"]], [p["b"], p["c"]]),
        lambda p: ([p["w"], -p["w"]], [p["b"], p["b"]]),
        lambda p: ([p["w"], p["w"].T], [p["b"], p["c"]]),
        lambda p: ([p["w"].T, p["v"]], [p["b"], p["c"]]),
    ],
    ids=["same", "two_biases", "negated", "transposed", "two_weights"],
)
def test_pieces_of_a_concatenation_are_uses_of_their_own(joined, apart, pieces):
    def loss(product, p, x):
        return mean_square(jnp.tanh(product(*pieces(p), x)) @ p["u"])

    names = {"u": (8, 3), "v": (4, 4), "w": (4, 4), "b": (4,), "c": (4,)}
    params = {name: array(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}
    params["u"] = params["u"] if joined is side_by_side else params["u"][:4]
    both = [functools.partial(loss, product) for product in (joined, apart)]
    table, expected = (str(singd_jax.find_layers(f)(params, X)) for f in both)
    assert table == expected
    alike(*(measured(f, params, X) for f in both))


@pytest.mark.parametrize("reduction", ["batch", "batch+sequence", None])
def test_a_weight_indexed_by_a_loop_is_a_stack_that_is_scanned_over(reduction):
    def indexed(p, x):
        def step(x, i):
            return jnp.tanh(x @ p["w"][i]) + x, None

        return mean_square(lax.scan(step, x, jnp.arange(3)[::-1])[0])

    def scanned(p, x):
        return mean_square(lax.scan(lambda x, w: (jnp.tanh(x @ w) + x, None), x, p["w"][::-1])[0])

    params, options = {"w": array(3, 4, 4)}, {"loss_average": reduction}
    got = measured(indexed, params, X, **options)["w"]
    alike(got, [a[::-1] for a in measured(scanned, params, X, **options)["w"]])


@pytest.mark.slow
def test_the_rows_of_each_ragged_group_are_its_own():
    def ragged(p, x, sizes):
        return mean_square(lax.ragged_dot(x, p["w"], sizes))

    def apart(p, x, sizes):
        rows = jnp.split(x, np.cumsum(sizes))
        return mean_square(
            jnp.concatenate(
                [x @ w for x, w in zip(rows, p, strict=False)] + [jnp.zeros((len(rows[-1]), 3))]
            )
        )

    w, options = array(3, 4, 3), {"batch_size": 6}
    sizes = np.array(SIZES)
    got = measured(ragged, {"w": w}, X, SIZES, **options)["w"]
    expected = measured(lambda p, x: apart(p, x, sizes), list(w), X, **options)
    for i in (0, 2):
        alike([a[i] for a in got], expected[str(i)])
    assert not any(np.any(a[1]) for a in got)  # a group without rows


def test_ragged_products_of_a_stack_are_layers_and_others_are_told():
    numbers = lax.RaggedDotDimensionNumbers
    batched = numbers((([2], [2]), ([0], [1])), [1], [0])
    several = numbers((([2], [1]), ([], [])), [1], [0])
    sizes = jnp.array([[1, 1, 1], [0, 2, 1]])

    def loss(p, x):
        y = lax.ragged_dot_general(x, p["stacked"], sizes, batched)
        return mean_square(y + lax.ragged_dot_general(x, p["w"], sizes[0], several))

    params, x = {"stacked": array(3, 2, 4, 3), "w": array(3, 4, 3)}, X.reshape(2, 3, 4)
    layers = singd_jax.find_layers(loss)(params, x)
    assert layers["stacked"].shape == ((2, 3), 3, 4)
    assert max(singd_jax.check(loss, layers)(params, x).values()) < 1e-5
    assert "reshape its rows to one axis, and take `lax.ragged_dot`" in layers.others["w"]


@pytest.mark.slow
def test_sampled_rows_of_ragged_groups_have_the_expected_sums():
    x, sizes = array(400, 4), jnp.array([150, 7, 0, 200])
    params = {"w": array(4, 4, 3)}

    def loss(p, x, sizes):
        return mean_square(lax.ragged_dot(x, p["w"], sizes))

    layers = singd_jax.find_layers(loss, batch_size=400)(params, x, sizes)

    def curvature(rows, step):
        state = singd_jax.singd(layers=layers, structures="dense", rows=rows, T=1).init(params)
        count = jnp.asarray(step, jnp.int32)
        core = dataclasses.replace(state.core, step=count)
        state = state.with_core(core)
        found = singd_jax.value_and_curvature(loss, layers)(params, state, x, sizes)[2]["w"]
        return np.asarray(found.H_K.dense()), np.asarray(found.H_C.dense())

    exact = curvature(np.inf, 0)
    some = [curvature(16, step) for step in range(40)]
    for whole, parts in zip(exact, zip(*some, strict=True), strict=True):
        np.testing.assert_allclose(parts[0][1], whole[1], rtol=2e-5, atol=1e-7)  # 7 rows are all
        for group in (0, 3):
            mean = np.mean([part[group] for part in parts], axis=0)
            scale = np.abs(whole[group]).max()
            assert np.abs(parts[0][group] - whole[group]).max() > 1e-3 * scale
            np.testing.assert_allclose(mean, whole[group], atol=0.1 * scale)


@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
def test_lookups_outside_of_the_table(mode):
    at = jnp.array([11, 2, 0, -12, 3, -1])

    def given(p, i):
        return mean_square(jnp.take(p["t"], i, axis=0, mode=mode, fill_value=0.0))

    def inside(p, i):
        if mode == "fill":
            rows = p["t"][jnp.where(i < 0, i + 10, i).clip(0, 9)]
            return mean_square(jnp.where(((i < -10) | (i > 9))[:, None], 0.0, rows))
        return mean_square(p["t"][i.clip(0, 9) if mode == "clip" else i % 10])

    params = {"t": array(10, 4)}
    layers = singd_jax.find_layers(given)(params, at)
    assert singd_jax.check(given, layers)(params, at)["t"] < 1e-5

    def diagonals(loss):
        state = singd_jax.singd(layers=layers, T=1).init(params)
        found = singd_jax.value_and_curvature(loss, layers)(params, state, at)[2]["t"]
        return np.asarray(found.H_K.dense()).diagonal(), np.asarray(found.H_C.dense())

    (K, C), (own_K, own_C) = diagonals(given), diagonals(inside)
    alike(C, own_C)
    if mode == "fill":  # what lies outside is no row
        own_K = np.bincount([2, 0, 3, 9], minlength=10) / len(at)
    alike(K, own_K)


@pytest.mark.slow
def test_what_no_layer_uses_of_a_padded_weight_stays_as_it_is():
    case = CASES["padded_table"]()
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    tx = singd_jax.singd(layers=layers, weight_decay=0.1)
    state, params = tx.init(case.params), case.params
    for _ in range(2):
        _, grads, curvature = singd_jax.value_and_curvature(case.loss, layers)(
            params, state, *case.batch
        )
        updates, state = tx.update(grads, state, params, curvature=curvature)
        params = jax.tree.map(jnp.add, params, updates)
    for name, rest in (("table", np.s_[7:]), ("head", np.s_[:, 3:]), ("bias", np.s_[3:])):
        np.testing.assert_array_equal(params[name][rest], case.params[name][rest])
        moved = np.array(params[name] != case.params[name])
        moved[rest] = True
        assert moved.mean() > 0.5


def test_a_loss_that_singd_evaluates_otherwise_is_told():
    calls = []

    def loss(p, x):
        calls.append(1)  # another function each time: no loss that jax can differentiate
        return mean_square(x @ p["w"]) * len(calls)

    params = {"w": array(4, 3)}
    layers = singd_jax.find_layers(loss)(params, X)
    with pytest.raises(AssertionError, match=r"differs from jax.value_and_grad.*the value \(0\."):
        singd_jax.check(loss, layers)(params, X)


def test_gradients_that_cancel_are_not_taken_for_a_fault():
    def loss(p, x):
        z = x @ p["w"]
        return jnp.mean((z - z.mean(0)) @ jnp.ones(3)) + 1e-9 * mean_square(z)

    params = {"w": array(4, 3)}
    layers = singd_jax.find_layers(loss)(params, X)
    singd_jax.check(loss, layers)(params, X)


@pytest.mark.parametrize("name", ["transposed_storage", "ragged_experts", "indexed_inside_a_loop"])
def test_no_rank_and_no_dtype_of_a_user_is_promoted(name):
    case = CASES[name]()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        layers = singd_jax.find_layers(case.loss, **case.options)(case.params, *case.batch)
        singd_jax.check(case.loss, layers)(case.params, *case.batch)
        tx = singd_jax.singd(layers=layers)

        def step(params, *batch):
            state, function = tx.init(params), singd_jax.value_and_curvature(case.loss, layers)
            _, grads, curvature = function(params, state, *batch)
            return tx.update(grads, state, params, curvature=curvature)

        jax.eval_shape(step, case.params, *case.batch)
