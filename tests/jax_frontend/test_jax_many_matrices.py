"""Many matrices share the size of their steps (5.10b), the matrices of a scan among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_cases import array, mean_square

import singd_jax

X = array(16, 4)


def scanned(p, x):
    return mean_square(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0])


def experts(p, x):
    inputs = jnp.stack([jnp.roll(x, i, 0) for i in range(len(p["w"]))])
    return mean_square(jnp.tanh(jnp.einsum("eni,eio->eno", inputs, p["w"])))


def vmapped(p, x):
    inputs = jnp.stack([jnp.roll(x, i, 0) for i in range(len(p["w"]))])
    return mean_square(jax.vmap(lambda x, w: jnp.tanh(x @ w))(inputs, p["w"]))


def sizes(loss, n, rows=True):
    """The norms of the first step of each of n matrices in one leaf."""
    params = {"w": jnp.stack([array(4, 4, seed=i) for i in range(n)])}
    tx = singd_jax.singd(warmup=0, **({"loss": loss} if rows else {}))
    state = tx.init(params, X) if rows else tx.init(params)
    if rows:
        _, grads = singd_jax.value_and_grad(loss)(params, state, X)
    else:
        grads = jax.grad(loss)(params, X)
    updates, _ = tx.update(grads, state, params)
    return np.linalg.norm(updates["w"], axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "rows"), [(experts, True), (vmapped, True), (experts, False)])
def test_a_stack_of_matrices_that_are_used_at_once_counts_once(loss, rows):
    many, few = (np.median(sizes(loss, n, rows)) for n in (24, 6))
    assert 0.8 < many / few < 1.25  # and not 1/2; the inputs differ in size


def in_a_loop(p, x):
    for i in range(len(p["w"])):
        x = jnp.tanh(x @ p["w"][i])
    return mean_square(x)


@pytest.mark.slow
def test_a_scan_and_a_loop_step_as_layers_of_their_own():
    n = 16
    stack = jnp.stack([array(4, 4, seed=i) for i in range(n)])
    apart = {f"w{i:02}": w for i, w in enumerate(stack)}

    def in_turn(p, x):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return mean_square(x)

    found = []
    for loss, params in ((scanned, {"w": stack}), (in_a_loop, {"w": stack}), (in_turn, apart)):
        tx = singd_jax.singd(warmup=0, loss=loss)
        state = tx.init(params, X)
        for _ in range(3):
            _, grads = singd_jax.value_and_grad(loss)(params, state, X)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        found.append(params)
    for own in found[:2]:
        np.testing.assert_allclose(own["w"], jnp.stack(list(found[2].values())), atol=2e-5)


def looped(p, x):
    return mean_square(lax.fori_loop(0, len(p["w"]), lambda i, h: jnp.tanh(h @ p["w"][i]), x))


def indexed(p, x):
    indices = jnp.arange(len(p["w"]))
    return mean_square(lax.scan(lambda h, i: (jnp.tanh(h @ p["w"][i]), None), x, indices)[0])


@pytest.mark.parametrize("loss", [scanned, looped, indexed, vmapped])
def test_matrices_that_a_loop_takes_by_an_index_count_once_each(loss):
    params = {"w": jnp.stack([array(4, 4, seed=i) for i in range(5)])}
    (layer,) = singd_jax.find_layers(loss)(params, X).values()
    assert layer.in_turn == (1 if loss is vmapped else 5)
