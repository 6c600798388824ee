"""Vectors of layers in a scan: the leaf is a matrix, and each step of the scan reads one vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import singd_jax
from singd_core import Fallback

D, N = 16, 6


def block(h, p):
    mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    y = (h - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["shift"]
    return h + jnp.tanh(y @ p["w"] + p["b"]) * p["gate"]


def scanned(params, x):
    y, _ = jax.lax.scan(lambda h, p: (block(h, p), None), x, params)
    return jnp.mean(jnp.sum(y**2, -1))


def unrolled(params, x):
    for p in params:
        x = block(x, p)
    return jnp.mean(jnp.sum(x**2, -1))


def blocks():
    keys = jax.random.split(jax.random.key(0), N)
    ones, zeros = jnp.ones(D), jnp.zeros(D)
    own = {"scale": ones, "shift": zeros, "b": zeros, "gate": jnp.ones(())}
    return [own | {"w": jax.random.normal(key, (D, D)) / 4} for key in keys]


def stacked(params):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def trained(loss, params, **given):
    x = jax.random.normal(jax.random.key(1), (64, D))
    fallback = Fallback(weight_decay=0.0)
    tx = singd_jax.singd(loss=loss, weight_decay=0.1, fallback=fallback, **given)
    state = tx.init(params, x)

    @jax.jit
    def step(params, state):
        _, grads = singd_jax.value_and_grad(loss)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(8):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("structures", [None, "diagonal"])
def test_scales_of_norms_in_a_scan_train_as_in_a_loop(structures):
    found, state = trained(scanned, stacked(blocks()), structures=structures)
    expected, _ = trained(unrolled, blocks(), structures=structures)
    for name, leaf in stacked(expected).items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=2e-5, err_msg=name)
    assert set(state.layers) == {"w"}
    assert state.nu["scale"].shape == (N, D)


def test_the_table_tells_what_trains_vectors_of_a_scan():
    layers = singd_jax.find_layers(scanned)(stacked(blocks()), jnp.ones((4, D)))
    rows = {line.split()[0]: line for line in str(layers).splitlines()}
    for name in ("scale", "shift"):
        assert "AdamW" in rows[name]
        assert "a vector in each step of a scan" in rows[name]
    assert "6 of 16×17" in rows["w"]


def test_a_matrix_that_a_scan_multiplies_entry_by_entry_is_one():
    params = {"mask": jnp.ones((N, D, D)), "rows": jnp.ones((N, D))}

    def loss(p, x):
        y, _ = jax.lax.scan(lambda h, m: (h @ (x.T @ x * m), None), x, p["mask"])
        return jnp.mean(y**2) + jnp.mean((x[:N] * p["rows"]) ** 2)  # not in a scan

    x = jax.random.normal(jax.random.key(1), (64, D))
    state = singd_jax.singd(loss=loss).init(params, x)
    assert set(state.layers) == {"mask", "rows"}


def test_equal_checkpointed_stages_have_their_vectors_each():
    stage = jax.checkpoint(lambda p, x: jax.lax.scan(lambda h, q: (block(h, q), None), x, p)[0])

    def loss(stages, x):
        for p in stages:
            x = stage(p, x)
        return jnp.mean(x**2)

    params = [stacked(blocks()[:4])] * 3
    layers = singd_jax.find_layers(loss)(params, jnp.ones((8, D)))
    vectors = {f"{i}.{name}" for i in range(3) for name in ("scale", "shift", "b")}
    assert layers.vectors >= vectors
    state = singd_jax.singd(layers=layers).init(params)
    assert set(state.layers) == {f"{i}.w" for i in range(3)}


def test_a_bias_in_a_scan_that_is_let_go_is_a_vector():
    """Two products share it, or another group trains their weights."""

    def shared(p, x):
        def step(x, q):
            return jnp.tanh(x @ q["v"] + q["b"]) + jnp.tanh(x @ q["w"] + q["b"]), None

        return jnp.mean(jax.lax.scan(step, x, p)[0] ** 2)

    weights = stacked(blocks())["w"]
    params, x = {"v": weights, "w": weights, "b": jnp.zeros((N, D))}, jnp.ones((8, D))
    layers = singd_jax.find_layers(shared)(params, x)
    assert set(singd_jax.singd(layers=layers).init(params).layers) == {"v", "w"}

    own = {"w": weights, "b": jnp.zeros((N, D))}
    layers = singd_jax.find_layers(lambda p, x: shared(p | {"v": weights}, x))(own, x)
    groups = {name: singd_jax.singd(layers=layers) for name in ("weights", "biases")}
    tx = optax.multi_transform(groups, {"w": "weights", "b": "biases"})
    assert not tx.init(own).inner_states["biases"].inner_state.layers
