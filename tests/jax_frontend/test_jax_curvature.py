"""U and G equal a computation example by example, and gradient and loss stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from jax import lax
from jax_all_cases import CASES
from jax_cases import IMAGES, SEQUENCE, N, X, array
from jax_control_cases import dense_with_a_rule
from jax_oracle import (
    close,
    cnn,
    factors,
    layers_in_a_scan,
    measured,
    mlp,
    mlp_params,
    oracle,
    patches,
)

import singd_jax


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("x", [X, SEQUENCE], ids=["vectors", "sequences"])
def test_factors_of_dense_layers(x, kfac_approx):
    params = mlp_params()
    _, _, found = measured(lambda p, x: jnp.mean(mlp(p, x)), params, x, kfac_approx=kfac_approx)
    for name, rows in oracle(mlp, params, x).items():
        for got, expected in zip(found[name], factors(*rows, kfac_approx), strict=True):
            close(got, expected)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_factors_of_convolutions(kfac_approx):
    params = {"w": array(3, 2, 2, 3), "b": array(3)}
    _, _, found = measured(
        lambda p, x: jnp.mean(cnn(p, x)), params, IMAGES, kfac_approx=kfac_approx
    )
    rows = oracle(cnn, params, IMAGES, patches)["w"]
    for got, expected in zip(found["w"], factors(*rows, kfac_approx), strict=True):
        close(got, expected)


@pytest.mark.parametrize("rule", [dense_with_a_rule, jax.vmap(dense_with_a_rule, (None, None, 0))])
def test_factors_inside_custom_jvp_are_those_outside(rule):
    params = mlp_params()
    _, _, found = measured(
        lambda p, x: jnp.mean(mlp(p, x, lambda _, x, w, b: rule(w, b, x))), params, X
    )
    for name, rows in oracle(mlp, params, X).items():
        for got, expected in zip(found[name], factors(*rows, "expand"), strict=True):
            close(got, expected)


def test_each_layer_of_a_scan_has_its_own_factors():
    params = {"w": array(2, 4, 4), "b": array(2, 4)}
    _, _, found = measured(lambda p, x: jnp.mean(layers_in_a_scan(p, x)), params, X)
    for name, rows in oracle(layers_in_a_scan, params, X).items():
        i = int(name.removeprefix("w."))
        for got, expected in zip(found["w"], factors(*rows, "expand"), strict=True):
            close(got[i], expected)


@pytest.mark.slow
def test_both_uses_of_a_tied_weight_have_a_curvature_and_the_factors_see_their_sum():
    params = {"w": array(4, 3), "b": array(3), "c": array(4)}

    def untied(p):
        return {"v": p["w"], "a": p["b"], "w": p["w"].T, "b": p["c"]}

    def loss(p, x):
        return jnp.mean(mlp(untied(p), x))

    _, _, found = measured(loss, params, X)
    rows = oracle(mlp, untied(params), X)
    (U, G), (U_T, G_T) = (factors(*rows[name], "expand") for name in "vw")
    U_T = U_T[:-1, :-1]  # the bias of the transposed use is not in the layer
    G_T = np.pad(G_T, (0, 1))  # and the other way round
    for got, expected in zip((*found["w"], *found["w transposed"]), (U, G, G_T, U_T), strict=True):
        close(got, expected)

    layers = singd_jax.find_layers(loss)(params, X)
    tx = singd_jax.singd(layers=layers, kfac=True, recipe="paper", T=1, lr_cov=1.0)
    state = tx.init(params)
    _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, X)
    kfac = tx.update(grads, state, params, curvature=curvature)[1].core.layers["w"].factors
    s = np.sqrt(np.trace(U) * np.trace(U_T) / (np.trace(G_T) * np.trace(G)))
    close(kfac.S_K.matrix, U + s * G_T)
    close(kfac.S_C.matrix, G + U_T / s)


def test_a_sum_and_a_mean_over_positions_are_scaled_as_told():
    params, x = mlp_params(), SEQUENCE

    def mean(p, x):
        return jnp.mean(mlp(p, x))

    _, _, expected = measured(mean, params, x)
    _, _, summed = measured(lambda p, x: N * mean(p, x), params, x, loss_average=None)
    # the mean over batch and sequence of terms S times as large
    _, _, both = measured(mean, params, x, loss_average="batch+sequence")
    S = x.shape[1]
    _, _, counted = measured(mean, params, x, loss_average=N * S)
    for name, (U, G) in expected.items():
        close(summed[name][0], U)
        close(summed[name][1], G * N)
        close(both[name][0], U)
        close(both[name][1], G * S)
        close(counted[name][1], G * S)


def _in_a_loop(p, x):
    return (jnp.mean(mlp(p, x[:2])) + 2 * jnp.mean(mlp(p, x[2:]))) / 3


def _in_chunks_and_the_rest(p, x):
    return jnp.mean(lax.map(lambda x: mlp(p, x[None])[0], x, batch_size=4))


@pytest.mark.parametrize("loss", [_in_a_loop, _in_chunks_and_the_rest])
def test_parts_of_a_batch_need_the_number_of_terms_and_the_table_says_so(loss):
    params, x = mlp_params(), SEQUENCE

    def whole(p, x):
        return jnp.mean(mlp(p, x))

    terms = x.shape[0] * x.shape[1]
    _, _, expected = measured(whole, params, x, loss_average="batch+sequence")
    _, _, found = measured(loss, params, x, loss_average=terms)
    for name, factors_of in expected.items():
        for got, own in zip(found[name], factors_of, strict=True):
            close(got, own)
    for function, average, told in (
        (loss, "batch+sequence", True),
        (loss, terms, False),
        (whole, "batch+sequence", False),
    ):
        table = str(singd_jax.find_layers(function, loss_average=average)(params, x))
        assert ("give loss_average=<number of terms>" in table) == told


def _with_aux(p, x):
    return jnp.mean(mlp(p, x)), (x @ p["v"] + p["a"]).max()


def _in_branches(p, x):
    def other(x):
        return jnp.sum((x @ p["v"] + p["a"]) @ p["w"] + p["b"])

    return lax.cond(x[0, 0, 0] > -9.0, lambda x: jnp.mean(mlp(p, x)), other, x)


def _in_a_scan(p, x):
    @jax.checkpoint
    def step(total, x):
        return total + jnp.mean(mlp(p, x)), None

    return lax.scan(step, 0.0, x[:, :, None].swapaxes(0, 1))[0] / x.shape[1]


@pytest.mark.parametrize("loss", [_with_aux, _in_branches, _in_a_scan])
def test_a_mean_over_positions_counts_the_products_that_have_a_gradient(loss):
    given = {"loss_average": "batch+sequence"}

    def mean(p, x):
        return jnp.mean(mlp(p, x)) / (x.shape[1] if loss is _in_a_scan else 1)

    _, _, expected = measured(mean, mlp_params(), SEQUENCE, **given)
    _, _, found = measured(loss, mlp_params(), SEQUENCE, has_aux=loss is _with_aux, **given)
    for name in expected:
        for got, want in zip(found[name], expected[name], strict=True):
            close(got, want)


def test_sixteen_bits_of_the_factors_do_not_round_a_sum_over_a_thousand_parts():
    def loss(p, x):
        return lax.scan(lambda t, x: (t + jnp.sum(mlp(p, x)) / 2048, None), 0.0, x)[0]

    params, x = mlp_params(), jnp.tile(X[:2], (1024, 1, 1))
    layers = singd_jax.find_layers(loss, batch_size=2048, structures="dense")(params, x)
    given = {"layers": layers, "recipe": "paper", "T": 2}
    tx = singd_jax.singd(preconditioner_dtype=("bfloat16", "bfloat16"), **given)
    own = singd_jax.MultiSteps(tx, 1, layers=layers)
    _, _, of_one = measured(lambda p, x: jnp.sum(mlp(p, x)) / 2, params, X[:2], structures="dense")
    function = jax.jit(singd_jax.value_and_curvature(loss, layers))
    for optimizer in (tx, own):
        state = optimizer.init(params)
        _, grads, curvature = function(params, state, x)
        for name, c in curvature.items():  # K = C = I, in eight bits of every part
            for H, full in zip((c.H_K, c.H_C), of_one[name], strict=True):
                np.testing.assert_allclose(jnp.trace(H.dense()), np.trace(full), rtol=2.0**-8)
        _, new = jax.jit(optimizer.update)(grads, state, params, curvature=curvature)
        kept = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (new, state)]
        assert kept[0] == kept[1]


def test_micro_batches_inside_the_loss_are_one_batch():
    params = mlp_params()

    def in_parts(p, x):
        total, _ = lax.scan(
            lambda t, x: (t + jnp.sum(mlp(p, x)), None), 0.0, x.reshape(2, N // 2, 4)
        )
        return total / N

    _, _, expected = measured(lambda p, x: jnp.mean(mlp(p, x)), params, X)
    _, _, found = measured(in_parts, params, X)
    for name in expected:
        for got, want in zip(found[name], expected[name], strict=True):
            close(got, want)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("linen_transformer_block", marks=pytest.mark.slow),
        pytest.param("remat_inside_scan", marks=pytest.mark.slow),
        "linen_batch_norm",
        "tied_embedding",
        "custom_jvp_inside_remat_and_scan",
        "bias_outside_of_a_custom_jvp",
    ],
)
def test_value_and_gradient_are_those_of_jax(name):
    case = CASES[name]()
    has_aux = case.options.pop("has_aux", False)
    value, grads, _ = measured(case.loss, case.params, *case.batch, has_aux=has_aux, **case.options)
    expected = jax.jit(jax.value_and_grad(case.loss, has_aux=has_aux))(case.params, *case.batch)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(expected)
    for got, want in zip(*map(jax.tree.leaves, ((value, grads), expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_hot_rows_have_the_diagonal_of_their_counts():
    case = CASES["embedding"]()
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    tx = singd_jax.singd(layers=layers, recipe="paper", T=1)
    function = jax.jit(singd_jax.value_and_curvature(case.loss, layers))
    _, _, curvature = function(case.params, tx.init(case.params), *case.batch)
    counts = np.bincount(np.asarray(case.batch[0]).ravel(), minlength=7)
    close(curvature["table"].H_K.diag, counts / counts.sum())  # K = I
    close(curvature["table"].t_U, 1 / 7)


@pytest.mark.parametrize(
    ("structures", "blind"),
    cases(
        [(("dense", "diagonal"), True), ("hierarchical:1,2", False)],
        fast=[("hierarchical:1,2", False)],
    ),
)
def test_only_structures_that_keep_too_little_are_measured_with_their_factors(structures, blind):
    params = mlp_params()

    def loss(p, x):
        return jnp.mean(mlp(p, x))

    layers = singd_jax.find_layers(loss, structures=structures)(params, X)
    tx = singd_jax.singd(layers=layers, T=1)
    function = jax.jit(singd_jax.value_and_curvature(loss, layers))
    state = tx.init(params)
    for _ in range(2):
        _, grads, curvature = function(params, state, X)
        used = state.core.layers["v"].factors
        _, state = jax.jit(tx.update)(grads, state, params, curvature=curvature)
    _, _, plain = measured(loss, params, X)
    found = curvature["v"].H_K, curvature["v"].H_C
    for L, H, S in zip((used.K, used.C), found, plain["v"], strict=True):
        assert np.abs(L.dense() - np.eye(len(S))).max() > 0.01
        seen = S if blind else np.asarray(L.dense().T @ S @ L.dense())
        close(H.dense(), type(L).project(seen).dense())
