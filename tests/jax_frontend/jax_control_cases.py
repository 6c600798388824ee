"""Losses with control flow, and with functions that have rules of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas
from jax_cases import SEQUENCE, Case, N, X, array, case, mean_square


@case
def scan_over_layers() -> Case:
    def loss(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"]), None

        return mean_square(lax.scan(layer, x, p)[0])

    return Case(loss, {"w": array(3, 4, 4), "b": array(3, 4)}, (X,), {"w"})


@case
def scan_over_time() -> Case:
    def loss(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["W"] + h @ p["U"] + p["b"])
            return h, h

        return mean_square(lax.scan(step, jnp.zeros((N, 3)), x.swapaxes(0, 1))[0])

    params = {"W": array(4, 3), "U": array(3, 3), "b": array(3)}
    return Case(loss, params, (SEQUENCE,), {"W", "U"})


@case
def scan_of_scan() -> Case:
    def loss(p, x):
        def inner(x, own):
            return jnp.tanh(x @ own), None

        def outer(x, own):
            return lax.scan(inner, x, own)[0], None

        return mean_square(lax.scan(outer, x, p)[0])

    return Case(loss, array(2, 2, 4, 4), (X,), {"params"})


@case
def remat_inside_scan() -> Case:
    def loss(p, x):
        @jax.checkpoint
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"]), None

        return mean_square(lax.scan(layer, x, p)[0])

    return Case(loss, {"w": array(2, 4, 4), "b": array(2, 4)}, (X,), {"w"})


@case
def cond() -> Case:
    def loss(p, x):
        y = lax.cond(x[0, 0] > -9.0, lambda x: x @ p["w"] + p["b"], lambda x: x[:, :3] * 2.0, x)
        return mean_square(y)

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})


@case
def branches_of_platforms() -> Case:
    def copied(x, y):
        y[...] = x[...]

    def elsewhere(x):  # lowered for a GPU alone
        x = lax.stop_gradient(x)[:, :3]
        return pallas.pallas_call(copied, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    def loss(p, x):
        branches = {"cpu": lambda w, x: x @ w, "cuda": lambda w, x: x @ w + elsewhere(x)}
        y = lax.platform_dependent(p["w"], x, **branches, default=lambda w, x: 2.0 * (x @ w))
        return mean_square(y + p["b"])

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"}, {"b"})


@case
def bias_in_one_branch() -> Case:
    def loss(p, x):
        y = lax.cond(x[0, 0] > 9.0, lambda y: y + p["b"], lambda y: y, x @ p["w"])
        return mean_square(y)

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"}, {"b"})


@case
def nested_jit_called_twice() -> Case:
    @jax.jit
    def dense(x, w, b):
        return jax.jit(jnp.matmul)(x, w) + b

    def loss(p, x):
        x = dense(jax.nn.relu(dense(x, p["v"], p["a"])), p["w"], p["b"])
        return mean_square(dense(jax.nn.silu(x), p["w"], p["b"]))

    params = {"v": array(4, 4), "a": array(4), "w": array(4, 4, seed=1), "b": array(4, seed=1)}
    return Case(loss, params, (X,), {"v", "w"})


@case
def vmap_over_seeds() -> Case:
    def loss(p, x):
        y = jax.vmap(lambda w, b: jnp.tanh(x @ w + b))(p["w"], p["b"])
        return mean_square(jnp.moveaxis(y, 0, 1))

    return Case(loss, {"w": array(2, 4, 3), "b": array(2, 3)}, (X,), {"w"})


@case
def vmap_over_examples() -> Case:
    def loss(p, x):
        def one(x):
            return jnp.sum((jnp.tanh(x @ p["w"] + p["b"]) - 0.3) ** 2)

        return jnp.mean(jax.vmap(one)(x))

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (SEQUENCE,), {"w"})


@case
def accumulation_inside_the_loss() -> Case:
    def loss(p, x):
        def part(total, x):
            return total + mean_square(x @ p["w"] + p["b"]) / 2, None

        return lax.scan(part, 0.0, x.reshape(2, N // 2, 4))[0]

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})


@case
def inner_gradient() -> Case:
    def loss(p, x):
        def energy(x):
            return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2)

        return mean_square(jax.grad(energy)(x))

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})


@case
def inside_custom_vjp() -> Case:
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda s, g: (s[1].T @ g, g @ s[0].T))

    def loss(p, x):
        return mean_square(product(p["w"], x) @ p["v"])

    return Case(loss, {"w": array(4, 4), "v": array(4, 3)}, (X,), {"v", "w"})


@jax.custom_jvp
def dense_with_a_rule(w, b, x):
    return x @ w + b


@dense_with_a_rule.defjvp
def _(primals, tangents):
    (w, b, x), (dw, db, dx) = primals, tangents
    return dense_with_a_rule(w, b, x), x @ dw + db + dx @ w


@case
def inside_custom_jvp() -> Case:
    def loss(p, x):
        x = jnp.tanh(dense_with_a_rule(p["v"], p["a"], x))
        return mean_square(dense_with_a_rule(p["w"], p["b"], x))

    params = {"v": array(4, 5), "a": array(5), "w": array(5, 3), "b": array(3)}
    return Case(loss, params, (X,), {"v", "w"})


@case
def custom_jvp_inside_remat_and_scan() -> Case:
    def loss(p, x):
        @jax.checkpoint
        def layer(x, own):
            return jnp.tanh(dense_with_a_rule(own["w"], own["b"], x)), None

        return mean_square(lax.scan(layer, x, p)[0])

    return Case(loss, {"w": array(2, 4, 4), "b": array(2, 4)}, (X,), {"w"})


@case
def bias_outside_of_a_custom_jvp() -> Case:
    @jax.custom_jvp
    def product(w, x, rows):
        return x[rows] @ w, jnp.argmax(x, axis=1)

    @product.defjvp
    def _(primals, tangents):
        (w, x, rows), (dw, dx, _) = primals, tangents
        y, best = product(w, x, rows)
        return (y, best), (x[rows] @ dw + dx[rows] @ w, np.zeros(best.shape, jax.dtypes.float0))

    def loss(p, x):
        y, _ = product(p["w"], x, jnp.arange(N)[::-1])
        return mean_square(y + p["b"])

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})


@case
def rounded_straight_through() -> Case:
    @jax.custom_jvp
    def rounded(w):
        return jnp.round(8.0 * w) / 8.0

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))

    def loss(p, x):
        return mean_square(x @ rounded(p["w"]) + p["b"])

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})
