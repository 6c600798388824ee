"""Gradients that carry the curvature, and what training loops do with them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax import lax
from jax_cases import N, X
from jax_runs import LAYERS, assert_close, loss, run, start

import singd_jax

Y = jnp.arange(N) % 3


def trained(tx, change=lambda grads: grads, steps=3, gradient=None):
    params, state = start(), tx.init(start())

    @jax.jit
    def step(params, state):
        both = (gradient or singd_jax.value_and_grad(loss))(params, state, X)
        updates, state = tx.update(change(both[1]), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 3])
def test_they_are_those_of_value_and_curvature(T):
    plain = singd_jax.singd(layers=LAYERS, T=T)
    tx = singd_jax.singd(loss=loss, T=T)
    state = tx.init(start(), X)
    value, grads = singd_jax.value_and_grad(loss)(start(), state, X)
    expected, own, curvature = singd_jax.value_and_curvature(loss, LAYERS)(
        start(), plain.init(start()), X
    )
    assert_close((value, grads.tree), (expected, own), 0.0)
    assert_close(grads.curvature, curvature, 1e-6)
    assert_close(optax.tree.norm(grads), optax.tree.norm(own), 0.0)
    assert_close(trained(plain), run(plain, steps=3), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda grads: jax.tree.map(lambda g: g * 0.37, grads), marks=pytest.mark.slow),
        pytest.param(
            lambda grads: jax.tree.map(lambda g, h: (g + h) / 2, grads, grads),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda grads: optax.clip_by_global_norm(1e-3).update(grads, optax.EmptyState())[0],
            marks=pytest.mark.slow,
        ),
        lambda grads: jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads),
    ],
    ids=["scaled", "accumulated", "clipped", "in bfloat16"],
)
def test_the_curvature_is_the_same_whatever_the_gradients_are_multiplied_by(change):
    tx = singd_jax.singd(layers=LAYERS, T=1)
    _, grads = singd_jax.value_and_grad(loss)(start(), tx.init(start()), X)
    assert_close(change(grads).curvature, grads.curvature, 0.02)  # of bfloat16
    assert not np.allclose(change(grads).carried["v"].t_U, 0.0, atol=0.0)


OTHER_MAPS = {
    "sign": jnp.sign,
    "square": jnp.square,
    "size": jnp.abs,
    "noise": lambda g: g + 1e-3,
    "centered": lambda g: g - jnp.mean(g, axis=-1, keepdims=True) if g.ndim > 1 else g,
}


def test_any_other_map_leaves_no_curvature():
    tx = singd_jax.singd(layers=LAYERS, T=1)
    _, grads = singd_jax.value_and_grad(loss)(start(), tx.init(start()), X)

    @jax.jit  # one compilation
    def changed(grads):
        return {k: jax.tree.map(f, grads).curvature for k, f in OTHER_MAPS.items()}

    for name, curvature in changed(grads).items():
        assert all(np.isnan(a).all() for a in jax.tree.leaves(curvature)), name
    apart = dataclasses.replace(grads, tree=jax.tree.map(jnp.sign, grads.tree))
    assert_close(apart.curvature, grads.curvature, 0.0)


COMBINATIONS = {
    "variance reduction": lambda new, old: 2 * new - old,
    "with a snapshot": lambda new, old: new - old + (new + old) / 2 * 1.5,
    "a tenth": lambda new, old: (1.1 * new - 0.1 * old) * 5,
    "of opposite sign": lambda new, old: old - 3 * new,
    "a difference": lambda new, old: new - old,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_with_a_negative_weight_leaves_no_curvature(dtype):
    tx = singd_jax.singd(layers=LAYERS, T=1)
    state, earlier = tx.init(start()), jax.tree.map(lambda p: p * 0.99, start())
    gradient = jax.jit(singd_jax.value_and_grad(loss))
    new, old = (
        jax.tree.map(lambda g: g.astype(dtype), gradient(p, state, X)[1])
        for p in (start(), earlier)
    )
    for name, combined in COMBINATIONS.items():
        curvature = jax.tree.map(combined, new, old).curvature
        assert all(np.isnan(a).all() for a in jax.tree.leaves(curvature)), name
    for weights in ((0.9, 0.1), (3.0, 2.0), (-1.0, -1.0), (2.0, 0.0)):
        both = jax.tree.map(lambda a, b, w=weights: w[0] * a + w[1] * b, new, old)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(both.curvature)), weights


def test_a_step_without_a_curvature_changes_nothing_and_is_counted():
    tx = singd_jax.singd(layers=LAYERS, T=1)
    params, state = trained(tx, lambda grads: jax.tree.map(jnp.sign, grads))
    assert_close(params, start(), 0.0)
    assert int(state.core.skipped) == 3


def test_gradients_clipped_by_value_carry_their_curvature():
    tx = singd_jax.singd(layers=LAYERS, T=1)
    _, grads = singd_jax.value_and_grad(loss)(start(), tx.init(start()), X)
    clipped, _ = optax.clip(1e-2).update(grads, optax.EmptyState())
    assert_close(clipped.curvature, grads.curvature, 0.0)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(clipped.tree)) <= 1e-2


def test_the_last_digits_of_float16_are_asked_for():
    tx = singd_jax.singd(layers=LAYERS, T=1)
    state = tx.init(start())
    _, grads = singd_jax.value_and_grad(loss)(start(), state, X)
    grads = jax.tree.map(lambda g: g.astype(jnp.float16), grads)
    with pytest.raises(
        ValueError, match=r"cast to float16.* cast to bfloat16, or only their `tree`"
    ):
        tx.update(grads, state, start())


def test_a_sum_over_micro_batches_is_a_large_batch():
    tx = optax.chain(optax.clip_by_global_norm(1.0), singd_jax.singd(layers=LAYERS, T=1))

    def micro(params, state, x):
        grad = singd_jax.value_and_grad(loss)

        def add(total, x):
            return jax.tree.map(jnp.add, total, grad(params, state, x)[1]), None

        parts = x.reshape(3, -1, *x.shape[1:])
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(grad, params, state, parts[0])[1],
        )
        total = lax.scan(add, zeros, parts)[0]
        return None, jax.tree.map(lambda g: g / 3, total)

    assert_close(trained(tx, gradient=micro)[0], trained(tx)[0], 1e-4)


@pytest.mark.slow
def test_a_mean_over_devices_is_one_of_the_curvature():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = singd_jax.singd(layers=LAYERS, T=1)

    def on_devices(params, state, x):
        def local(params, state, x):
            return lax.pmean(singd_jax.value_and_grad(loss)(params, state, x), "data")

        spec = jax.sharding.PartitionSpec
        specs = (spec(), spec(), spec("data"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec(), check_vma=False)(
            params, state, x
        )

    assert_close(trained(tx, gradient=on_devices)[0], trained(tx)[0], 1e-5)


@pytest.mark.slow
def test_flax_train_state_takes_them():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)

    def loss(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    layers = singd_jax.find_layers(loss)(params, X, Y)
    tx = singd_jax.singd(layers=layers)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    plain_params, plain = params, tx.init(params)

    @jax.jit
    def step(state, x, y):
        def closure(params):
            return loss(params, x, y)

        grad = singd_jax.value_and_grad(closure, has_aux=True)
        (value, logits), grads = grad(state.params, state.opt_state)
        return state.apply_gradients(grads=grads), value, logits

    values = []
    for _ in range(4):
        state, value, logits = step(state, X, Y)
        values.append(float(value))
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers, has_aux=True)(
            plain_params, plain, X, Y
        )
        updates, plain = tx.update(grads, plain, plain_params, curvature=curvature)
        plain_params = optax.apply_updates(plain_params, updates)
    assert values[-1] < values[0]
    assert logits.shape == (N, 3)
    assert_close(state.params, plain_params, 1e-4)


def test_what_cannot_carry_them_is_an_error_that_names_the_other_way():
    plain, matrices = singd_jax.singd(layers=LAYERS), {k: k != "scale" for k in start()}
    for tx, instead in (
        (optax.masked(plain, matrices), "give tx.update"),
        (optax.apply_if_finite(plain, 3), "give tx.update"),
        (optax.conditionally_transform(plain, lambda step: step < 3), "give tx.update"),
        (optax.chain(optax.zero_nans(), plain), "give tx.update"),
        (optax.chain(optax.masked(optax.clip(1.0), matrices), plain), "give tx.update"),
        (optax.named_chain(("a", optax.chain(optax.trace(0.9))), ("b", plain)), "give tx.update"),
        (optax.MultiSteps(plain, 2), r"take singd_jax\.MultiSteps\(\.\.\., layers=layers\) in"),
    ):
        message = rf"they cannot carry the curvature: {instead}.*value_and_curvature"
        with pytest.raises(ValueError, match=message):
            singd_jax.value_and_grad(loss)(start(), tx.init(start()), X)


def test_sam_and_noise_are_errors_that_name_the_other_way():
    plain, adversary = singd_jax.singd(layers=LAYERS), optax.sgd(0.1)
    for tx, message in (
        (optax.contrib.sam(plain, adversary), r"SAMState: .*put singd\(\) without layers into it"),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), plain), "AddNoiseState: .*add it to grads.tree"),
    ):
        with pytest.raises(ValueError, match=message):
            singd_jax.value_and_grad(loss)(start(), tx.init(start()), X)


def test_lookahead_takes_them_for_its_fast_parameters():
    tx = optax.lookahead(singd_jax.singd(layers=LAYERS, T=1), 2, 0.5)
    params = optax.LookaheadParams.init_synced(start())
    state = tx.init(params)
    _, grads = singd_jax.value_and_grad(loss)(params.fast, state, X)
    _, state = jax.jit(tx.update)(grads, state, params)
    assert float(state.fast_state.core.layers["v"].factors.averages.k) == 1.0


def test_what_comes_after_singd_may_map_other_trees():
    after = (
        optax.add_noise(0.0, 0.5, 0),
        optax.zero_nans(),
        optax.trace(0.5),
        optax.scale_by_schedule(lambda step: 0.5),
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), singd_jax.singd(layers=LAYERS), *after)
    state = trained(tx, steps=2)[1]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(start()))


def test_micro_batches_of_multi_steps():
    plain = singd_jax.singd(layers=LAYERS, T=1)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    assert_close(trained(tx, steps=4)[0], trained(plain, steps=2)[0], 1e-5)


def test_a_loss_of_other_products_is_an_error():
    tx = singd_jax.singd(loss=loss)
    state = tx.init(start(), X)

    def other(p, x):
        return jnp.mean(p["scale"] ** 2) + 0 * x.sum()

    def turned(p, x):
        return loss(p, x) + jnp.mean((x[:, :2] @ p["v"].reshape(2, -1)) ** 2)

    with pytest.raises(ValueError, match="uses none of v, w as in the loss"):
        singd_jax.value_and_grad(other)(start(), state, X)
    with pytest.raises(ValueError, match="'v' is used as another matrix"):
        singd_jax.value_and_grad(turned)(start(), state, X)


def test_the_layers_are_found_where_the_batch_is():
    with pytest.raises(TypeError, match=r"either loss=loss.* or .*layers="):
        singd_jax.singd(loss=loss, layers=LAYERS)
    chained = optax.chain(optax.clip(1.0), singd_jax.singd(loss=loss))
    with pytest.raises(ValueError, match=r"got no batch: .* layers=singd_jax.find_layers\(loss\)"):
        chained.init(start())
    closed = singd_jax.singd(loss=lambda p: loss(p, X))
    assert set(closed.init(start()).rest.layers) == {"v", "w"}
