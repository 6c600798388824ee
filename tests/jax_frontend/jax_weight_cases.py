"""Weights that are multiplied, indexed, padded or grouped before they meet data."""

import jax
import jax.numpy as jnp
from jax import lax
from jax_cases import SEQUENCE, Case, N, X, array, case, mean_square

SIZES = jnp.array([2, 0, 3])  # of the groups of six rows; the last row is in no group


@case
def factors_of_a_weight() -> Case:
    def loss(p, x):
        x = jnp.tanh(x @ (p["a"] * 0.3) + p["bias"])
        x = jnp.tanh(x @ (p["b"] / jnp.sqrt(x.shape[-1])))
        return mean_square((2.0 * -p["c"].T) @ x.T * p["gain"])

    params = {"a": array(4, 5), "b": array(5, 3), "c": array(3, 2), "bias": array(5)}
    return Case(loss, params | {"gain": jnp.ones(())}, (X,), {"a", "b", "c"}, {"gain"})


@case
def a_trained_number_times_a_weight() -> Case:
    def loss(p, x):
        return mean_square(x @ (p["w"] * jnp.exp(p["log_scale"])) + x @ (p["gain"] * p["v"]))

    params = {"w": array(4, 3), "v": array(4, 3, seed=1)}
    numbers = {"log_scale": jnp.array(0.2), "gain": jnp.array(0.7)}
    return Case(loss, params | numbers, (X,), {"v", "w"}, {"gain", "log_scale"})


@case
def factor_of_a_table_and_of_joined_weights() -> Case:
    def loss(p, i):
        x = (p["table"] * 3.0)[i]
        return mean_square(x @ (jnp.concatenate([p["k"], p["v"]], axis=1) * 0.5))

    params = {"table": array(7, 4), "k": array(4, 2), "v": array(4, 3)}
    return Case(loss, params, (jnp.array([0, 3, 3, 6, 1, 3]),), {"k", "table", "v"})


@case
def factor_inside_a_scan_and_remat() -> Case:
    def loss(p, x):
        @jax.checkpoint
        def step(x, w):
            return jnp.tanh(x @ (w * 0.5)) + x, None

        return mean_square(lax.scan(step, x, p["w"] / 2.0)[0])

    return Case(loss, {"w": array(3, 4, 4)}, (X,), {"w"})


@case
def indexed_inside_a_loop() -> Case:
    def loss(p, x):
        def step(x, i):
            w = lax.dynamic_index_in_dim(p["w"], i, keepdims=False)
            return jnp.tanh(x @ w) @ p["v"][:, i] + x, None

        return mean_square(lax.scan(step, x, jnp.arange(3))[0])

    return Case(loss, {"w": array(3, 4, 5), "v": array(5, 3, 4)}, (X,), {"v", "w"})


@case
def one_expert_of_each_layer() -> Case:
    def loss(p, x, expert):
        def step(x, own):
            w, e = own
            return jnp.tanh(x @ (w[e] * 0.5)) + x, None

        return mean_square(lax.scan(step, x, (p["w"], expert))[0])

    options = {"batch_size": N}
    return Case(loss, {"w": array(2, 3, 4, 4)}, (X, jnp.array([2, 0])), {"w"}, options=options)


@case
def ragged_experts() -> Case:
    def loss(p, x, sizes):
        x = jnp.tanh(lax.ragged_dot(x, p["up"] * 0.5, sizes))
        return mean_square(lax.ragged_dot(x, p["down"].swapaxes(1, 2), sizes))

    params, options = {"up": array(3, 4, 5), "down": array(3, 2, 5)}, {"batch_size": N}
    return Case(loss, params, (X, SIZES), {"down", "up"}, options=options)


@case
def ragged_experts_of_each_layer() -> Case:
    def loss(p, x, sizes):
        def step(x, w):
            return jnp.tanh(lax.ragged_dot(x, w, sizes)) + x, None

        return mean_square(lax.scan(step, x, p["w"])[0])

    params, options = {"w": array(2, 3, 4, 4)}, {"batch_size": N}
    return Case(loss, params, (X, SIZES), {"w"}, options=options)


@case
def padded_table() -> Case:
    def loss(p, i):
        return mean_square(p["table"][:7][i] @ p["head"][:, :3] + p["bias"][:3])

    params = {"table": array(8, 4), "head": array(4, 6), "bias": array(6)}
    layers = {"table[0:7,:]", "head[:,0:3]"}
    return Case(loss, params, (jnp.array([0, 3, 3, 6, 1, 3]),), layers)


@case
def padded_table_with_a_penalty_on_all_of_it() -> Case:
    def loss(p, i):
        return mean_square(p["table"][:7][i]) + 0.1 * jnp.sum(p["table"] ** 2)

    return Case(loss, {"table": array(8, 4)}, (jnp.array([0, 3, 3, 6, 1, 3]),), set(), {"table"})


@case
def part_of_a_weight_that_is_no_layer() -> Case:
    def loss(p, x):
        return mean_square(x @ p["w"][:, :3]) + jnp.sum(p["w"][:, 3:] ** 2)

    return Case(loss, {"w": array(4, 5)}, (X,), set(), {"w"})


@case
def reads_that_give_no_gradient() -> Case:
    def loss(p, x):
        jax.tree.map(lambda a: jnp.take(a, 0, axis=0), p)
        p["w"].reshape(2, -1).T @ jnp.ones((2, 2))
        target = lax.stop_gradient(p["w"][::2] @ p["w"][:, ::2])
        sharp = jnp.argmax(p["w"]) > 3
        y = jnp.where(sharp, x @ p["w"], x @ p["w"])
        return mean_square(y) + target.sum(), p["w"] * x.sum()

    return Case(loss, {"w": array(4, 4)}, (X,), {"w"}, options={"has_aux": True})


@case
def on_another_device() -> Case:
    def loss(p, x):
        w, b = jax.device_put((p["w"], p["b"]), jax.devices()[0])
        return mean_square(x @ w + jax.device_put(b, jax.devices()[0]))

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (SEQUENCE,), {"w"})


@case
def constants_of_numpy_in_functions_with_rules() -> Case:
    @jax.custom_vjp
    def scaled(x, ts):
        return x * ts.sum()

    def backward(ts, g):
        return lax.fori_loop(0, 2, lambda i, a: a + g * ts[i], jnp.zeros_like(g)), None

    scaled.defvjp(lambda x, ts: (x * ts.sum(), ts), backward)

    def loss(p, x):
        return mean_square(scaled(x @ p["w"], jnp.array([1.0, 2.0])))

    return Case(loss, {"w": array(4, 4)}, (X,), {"w"})
