"""Micro-batches: `optax.MultiSteps` and `singd_jax.MultiSteps`."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_cases import N, X, array, mean_square
from jax_runs import LAYERS, assert_close, run, start, state_of, stepper

import singd_jax


def test_multi_steps_of_optax_accumulate_gradients():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    tx = optax.MultiSteps(plain, every_k_schedule=2)
    params, state = run(tx, steps=4)  # of equal batches: two steps of the plain one
    assert int(state.gradient_step) == 2
    assert_close(params, run(plain, steps=2)[0])


@pytest.mark.slow
def test_multi_steps_in_a_chain():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    clip, own = optax.clip_by_global_norm(1e9), singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    params, state = run(optax.chain(clip, own.gradient_transformation()), steps=4)
    assert int(state_of(state).core.layers["w"].factors.averages.k) == 2
    assert_close(params, run(plain, steps=2)[0])
    optax_steps = optax.MultiSteps(plain, 2).gradient_transformation()
    for lost in (optax.chain(clip, optax_steps), optax.masked(optax_steps, True)):
        with pytest.raises(ValueError, match=r"take singd_jax\.MultiSteps"):
            run(lost)
    with pytest.raises(ValueError, match=r"put its gradient_transformation\(\)"):
        run(optax.chain(clip, own))
    kept = optax.MultiSteps(optax.chain(clip, plain), 2).gradient_transformation()
    assert_close(run(kept, steps=4)[0], params)


def tied_loss(p, x):
    y = jnp.tanh(x @ p["v"] + p["a"]) @ p["w"]
    return mean_square(y @ p["v"] @ p["v"].T)


IN_GAPS, KFAC = {"T": 2, "growing_T": False}, {"recipe": "paper", "T": 1, "kfac": True}


@pytest.mark.parametrize(
    ("loss_average", "given"),
    [
        ("batch", IN_GAPS),
        pytest.param(None, KFAC, marks=pytest.mark.slow),
        pytest.param("batch", KFAC, marks=pytest.mark.slow),
        pytest.param(None, IN_GAPS, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_are_one_large_batch(loss_average, given):
    params = {"v": array(4, 5), "a": array(5), "w": array(5, 4)}
    scale = 1.0 if loss_average else float(N)

    def loss(p, x):
        return tied_loss(p, x) * (scale * len(x) / N if loss_average is None else 1.0)

    layers = singd_jax.find_layers(loss, loss_average=loss_average)(params, X)
    assert layers["v"].transposed
    plain = singd_jax.singd(0.02, layers=layers, **given)
    tx = singd_jax.MultiSteps(plain, 3, layers=layers)
    step, whole = stepper(tx, loss, layers), stepper(plain, loss, layers)
    state, expected, plain_state = tx.init(params), params, plain.init(params)
    for i in range(3):
        x = (1.0 + i) * X
        for part in x.reshape(3, 2, 4):
            params, state, _ = step(params, state, part)
        expected, plain_state, _ = whole(expected, plain_state, x)
    # float32: the sum of the gradients of three parts is rounded in another order
    assert_close(params, expected, 1e-5)
    assert_close(state_of(state).core.layers, plain_state.core.layers, 1e-4)


@pytest.mark.slow
def test_micro_batches_may_be_skipped_and_need_a_curvature():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS, should_skip_update_fn=optax.skip_not_finite)
    step, params, state = stepper(tx), start(), tx.init(start())
    for x in (X, X * jnp.nan, X):
        params, state, _ = step(params, state, x)
    assert int(state.gradient_step) == 1
    assert_close(params, run(plain, steps=1)[0])
    with pytest.raises(ValueError, match="curvature=curvature"):
        tx.update(params, state, params)


@pytest.mark.slow
def test_a_micro_batch_that_is_not_finite_spoils_one_step_alone():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1, warmup=0)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    step, params, state = stepper(tx), start(), tx.init(start())
    for x in (X, X * jnp.nan, X, X):
        params, state, _ = step(params, state, x)
    assert int(state_of(state).core.skipped) == 1
    assert_close(params, run(plain, steps=1)[0])


@pytest.mark.parametrize("loss_average", ["batch", None])
def test_no_rank_and_no_dtype_of_a_user_is_promoted_between_micro_batches(loss_average):
    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["w"]))

    params = {"w": array(4, 3)}
    layers = singd_jax.find_layers(loss, loss_average=loss_average)(params, X)
    tx = singd_jax.MultiSteps(singd_jax.singd(layers=layers), 2, layers=layers)

    def step(params, x):
        state, function = tx.init(params), singd_jax.value_and_curvature(loss, layers)
        _, grads, curvature = function(params, state, x)
        return tx.update(grads, state, params, curvature=curvature)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(step, params, X)


def test_a_named_chain_that_drops_the_curvature_is_an_error():
    plain = singd_jax.singd(0.02, layers=LAYERS, **IN_GAPS)
    clip = ("clip", optax.clip_by_global_norm(1e9))
    lost = optax.named_chain(clip, ("singd", optax.MultiSteps(plain, 2).gradient_transformation()))
    with pytest.raises(ValueError, match=r"take singd_jax\.MultiSteps"):
        run(lost)
    own = singd_jax.MultiSteps(plain, 2, layers=LAYERS).gradient_transformation()
    params, _ = run(optax.named_chain(clip, ("singd", own)))
    assert_close(params, run(plain, 2)[0])
