"""Backward scans, weights used twice, views that are turned or cut, updates that must be zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from jax import lax
from jax_cases import SEQUENCE, N, X, array, mean_square

import singd_jax

PAPER: dict[str, Any] = {"recipe": "paper", "structures": ("dense", "dense"), "T": 1}


def curvature_of(loss: Any, params: Any, *batch: Any, **options: Any) -> Any:
    """Value, gradient and curvature at the start, where the factors are the identity."""
    layers = singd_jax.find_layers(loss, **options)(params, *batch)
    state = singd_jax.singd(layers=layers, **PAPER).init(params)
    return layers, singd_jax.value_and_curvature(loss, layers)(params, state, *batch)


def close(ours: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_scan_may_run_backward() -> None:
    def loss(p: Any, x: Any) -> Any:
        last, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"], reverse=True)
        return mean_square(last)

    def unrolled(p: Any, x: Any) -> Any:
        for i in (2, 1, 0):
            x = jnp.tanh(x @ p[f"w{i}"])
        return mean_square(x)

    params = {"w": array(3, 4, 4)}
    _, (value, grads, found) = curvature_of(loss, params, X)
    close((value, grads), jax.value_and_grad(loss)(params, X))
    _, (_, _, each) = curvature_of(unrolled, {f"w{i}": params["w"][i] for i in range(3)}, X)
    for i in range(3):
        close(found["w"].H_K.dense()[i], each[f"w{i}"].H_K.dense())
        close(found["w"].H_C.dense()[i], each[f"w{i}"].H_C.dense())


def test_a_weight_used_twice_under_a_mean_over_positions_has_the_terms_of_one_use() -> None:
    """The rows of both uses are the rows of one loss, a mean of N · 3 terms."""

    def probed(p: Any, x: Any, first: Any, second: Any) -> Any:
        hidden = jnp.tanh(x @ p["w"] + first)
        return jnp.mean(jnp.sum((hidden @ p["w"] + second - 0.3) ** 2, axis=-1))

    params, zeros = {"w": array(4, 4)}, jnp.zeros((N, 3, 4))
    _, (_, _, found) = curvature_of(
        lambda p, x: probed(p, x, zeros, zeros), params, SEQUENCE, loss_average="batch+sequence"
    )
    B = jnp.concatenate(
        [g.reshape(-1, 4) for g in jax.grad(probed, (2, 3))(params, SEQUENCE, zeros, zeros)]
    )
    close(found["w"].H_C.dense(), 3 * N * B.T @ B)


@pytest.mark.slow
def test_micro_batches_of_a_sum_add_up_for_both_roles_of_a_tied_weight() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum((jnp.tanh(x @ p["w"]) @ p["w"].T - 0.3) ** 2)

    params, x = {"w": array(4, 3)}, array(2 * N, 4, seed=3)
    layers = singd_jax.find_layers(loss, loss_average=None)(params, x)
    tx = singd_jax.singd(0.01, layers=layers, **PAPER)
    whole, state = params, tx.init(params)
    for _ in range(2):
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(whole, state, x)
        updates, state = tx.update(grads, state, whole, curvature=curvature)
        whole = optax.apply_updates(whole, updates)

    tx = singd_jax.MultiSteps(tx, 2, layers=layers)
    found, state = params, tx.init(params)
    for i in (0, 1, 0, 1):
        part = x[i * N : (i + 1) * N]
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(found, state, part)
        updates, state = tx.update(grads, state, found, curvature=curvature)
        found = optax.apply_updates(found, updates)
    close(found, whole)


def test_natural_gradients_are_zero_where_anything_is_not_finite() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ p["w"]) * p["s"]) ** 2)

    params = {"w": array(4, 3), "s": jnp.ones(3)}
    layers = singd_jax.find_layers(loss)(params, X)
    tx = singd_jax.scale_by_singd(layers=layers)
    grads = {"w": jnp.ones((4, 3)), "s": jnp.array([1.0, jnp.nan, 1.0])}
    updates, state = tx.update(grads, tx.init(params), curvature=None)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert int(state.core.skipped) == 1


# What is found of the weight, if anything, and how the loss uses it.
VIEWS: dict[str, tuple[set[str], Any]] = {
    "a slice of a flipped axis": (set(), lambda w, x: x[:, :2] @ jnp.flip(w, 0)[:2]),
    "a flipped slice": ({"w[0:2,:]"}, lambda w, x: x[:, :2] @ jnp.flip(w[:2], 0)),
    "an axis split unevenly": (
        {"w"},
        lambda w, x: jnp.einsum("bji,ijo->bo", x.reshape(-1, 3, 2), w.reshape(2, 3, -1)),
    ),
    "an axis split and turned": (
        {"w"},
        lambda w, x: x @ w.reshape(2, 3, -1).swapaxes(0, 1).reshape(6, -1),
    ),
    "a slice of a split axis": ({"w[3:6,:]"}, lambda w, x: x[:, :3] @ w.reshape(2, 3, -1)[1]),
    "slices of a split axis": (
        {"w[2:6,:]"},
        lambda w, x: x[:, :4] @ w.reshape(3, 2, -1)[1:].reshape(4, -1),
    ),
}


@pytest.mark.parametrize(
    "name",
    cases(VIEWS, fast=["a slice of a flipped axis", "a flipped slice"]),
)
def test_a_view_of_a_weight_has_its_rows_or_none(name: str) -> None:
    """`check` holds every layer that is found to Bᵀ A = ∇W."""
    expected, view = VIEWS[name]

    def loss(p: Any, x: Any) -> Any:
        return mean_square(jnp.tanh(view(p["w"], x)) @ p["last"])

    params, x = {"w": array(6, 4), "last": array(4, 2)}, array(N, 6)
    layers, (value, grads, _) = curvature_of(loss, params, x)
    assert set(layers) == {"last"} | expected
    close((value, grads), jax.value_and_grad(loss)(params, x))
    singd_jax.check(loss, layers)(params, x)


@pytest.mark.slow
def test_a_loss_that_names_an_axis_has_the_curvature_of_the_whole_batch():
    params = {"w": array(4, 3)}

    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["w"]))

    def mean(p, x):
        return lax.pmean(loss(p, x), "devices")

    with pytest.raises(NameError, match=r"give find_layers the loss without its lax\.pmean"):
        singd_jax.find_layers(mean)(params, X)
    layers, (_, *expected) = curvature_of(loss, params, X)
    state = singd_jax.singd(layers=layers, **PAPER).init(params)

    def part(x):
        return lax.pmean(singd_jax.value_and_grad(mean)(params, state, x)[1], "devices")

    grads = jax.vmap(part, axis_name="devices", out_axes=None)(X.reshape(2, -1, *X.shape[1:]))
    close((grads.tree, grads.curvature), expected)


def test_a_product_of_a_custom_jvp_in_a_scan_runs_in_each_step() -> None:
    """M counts the steps, where each is a term of the loss."""

    @jax.custom_jvp
    def product(x: Any, w: Any) -> Any:
        return x @ w

    @product.defjvp
    def _rule(primals: Any, tangents: Any) -> Any:
        (x, w), (dx, dw) = primals, tangents
        return x @ w, dx @ w + x @ dw

    def loss(multiply: Any) -> Any:
        def run(p: Any, xs: Any) -> Any:
            def step(h: Any, x: Any) -> Any:
                h = jnp.tanh(multiply(h, p["w"]) + x)
                return h, h

            return mean_square(lax.scan(step, jnp.zeros(xs.shape[1:]), xs)[1])

        return run

    given = {"w": array(4, 4)}, array(6, 8, 4)
    terms = {"loss_average": "batch+sequence", "batch_size": 8}
    found, expected = (
        curvature_of(loss(f), *given, **terms)[1][2]["w"] for f in (product, jnp.matmul)
    )
    close(found, expected)


def test_numbers_of_numpy_are_numbers() -> None:
    params = {"w": array(4, 4)}

    def loss(p: Any, x: Any) -> Any:
        return mean_square(jnp.tanh(x @ p["w"]))

    found, expected = (
        curvature_of(loss, params, X, loss_average=n)[1][2]["w"] for n in (np.int64(16), 16)
    )
    close(found, expected)
    layers = singd_jax.find_layers(loss)(params, X)
    singd_jax.singd(layers=layers, rows=np.int64(64)).init(params)
    with pytest.raises(ValueError, match="T=0"):
        singd_jax.singd(layers=layers, T=np.int64(0))


def test_a_state_that_is_donated_leaves_the_given_numbers() -> None:
    params, T = {"w": array(4, 4)}, jnp.asarray(10, jnp.int32)
    tx = singd_jax.singd(0.1, T=T)
    for one in (tx, tx, optax.inject_hyperparams(singd_jax.singd)(0.1, T=jnp.copy(T))):
        state = one.init(params)
        step = jax.jit(one.update, donate_argnums=1)
        for _ in range(2):
            _, state = step(params, state, params)
    assert int(T) == 10


@pytest.mark.slow
def test_steps_that_are_not_compiled_may_look_for_nan() -> None:
    params = {"w": array(4, 4)}
    tx = singd_jax.singd()
    with jax.debug_nans(True):
        updates, _ = tx.update(params, tx.init(params), params)
    assert bool(jnp.isfinite(updates["w"]).all())


@pytest.mark.parametrize("structures", cases(["dense", None], fast=["dense"]))
def test_steps_that_are_not_compiled_equal_compiled_ones_and_compile_nothing(
    structures: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(p: Any, x: Any) -> Any:
        return mean_square(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"])

    tx = singd_jax.singd(loss=loss, T=2, growing_T=False, structures=structures, rows=4)
    params = {"w": array(4, 5), "b": array(5), "u": array(5, 2)}
    start = params, tx.init(params, X)

    def step(params: Any, state: Any) -> Any:
        _, grads = singd_jax.value_and_grad(loss)(params, state, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    now, compiled, expected = start, jax.jit(step), start
    for _ in range(4):
        now, expected = step(*now), compiled(*expected)
    with jax.log_compiles():
        for _ in range(2):
            now = step(*now)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    for _ in range(2):
        expected = compiled(*expected)
    close(now, expected)


@jax.custom_jvp
def with_a_rule(w: Any, x: Any) -> Any:
    return x @ w


with_a_rule.defjvp(lambda given, t: (given[1] @ given[0], t[1] @ given[0] + given[1] @ t[0]))


@jax.custom_vjp
def with_a_backward_pass(w: Any, x: Any) -> Any:
    return x @ w


with_a_backward_pass.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T)
)


def in_columns(w: Any, x: Any, start: Any) -> Any:
    return x @ lax.dynamic_slice(w, (jnp.zeros_like(start), start), (4, 2))


@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
@pytest.mark.parametrize(
    ("use", "number"),
    [
        (lambda w, x, t: with_a_rule(t * w, x), 2.0),
        (lambda w, x, t: with_a_rule(2.0 * w / 3.0, x) * t, 2.0),
        (lambda w, x, t: with_a_backward_pass(w / t, x), 2.0),
        (lambda w, x, t: jax.jit(lambda t: with_a_rule(t * w, x))(3.0) * t, 2.0),
        (in_columns, 1),
        (lambda w, x, t: in_columns(w, x, jnp.asarray(1)) * t, 1),
        (lambda w, x, t: in_columns(w, x, t) + x @ lax.dynamic_slice(w, (0, 1), (4, 2)), 1),
    ],
)
def test_steps_that_are_not_compiled_measure_the_same_uses(
    use: Any, number: Any, as_array: Any
) -> None:
    def loss(p: Any, x: Any, t: Any) -> Any:
        return mean_square(jnp.tanh(x @ p["w"])) + mean_square(use(p["w"], 3.0 * x, t))

    params, t = {"w": array(4, 3)}, as_array(number)
    layers = singd_jax.find_layers(loss, batch_size=N)(params, X, t)
    shapes = jax.eval_shape(lambda *given: given, params, X, t)
    assert str(singd_jax.find_layers(loss, batch_size=N)(*shapes)) == str(layers)
    state = singd_jax.singd(layers=layers, kfac=True, T=1).init(params)
    measured = singd_jax.value_and_curvature(loss, layers)
    close(measured(params, state, X, t), jax.jit(measured)(params, state, X, t))
