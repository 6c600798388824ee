"""The factors of layers by a computation that looks inside the model, example by example.

The models are written with a function for their products, so that it can.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax_cases import array

import singd_jax


def dense(name, x, w, b):
    return x @ w + b


def mlp(p, x, product=dense):
    x = jnp.tanh(product("v", x, p["v"], p["a"]))
    return jnp.sum((product("w", x, p["w"], p["b"]) - 0.3) ** 2, axis=range(1, x.ndim))


def layers_in_a_scan(p, x, product=dense):
    if product is dense:
        x = lax.scan(lambda x, own: (jnp.tanh(dense("w", x, *own)), None), x, (p["w"], p["b"]))[0]
    else:
        for i in range(len(p["w"])):
            x = jnp.tanh(product(f"w.{i}", x, p["w"][i], p["b"][i]))
    return jnp.sum((x - 0.3) ** 2, axis=range(1, x.ndim))


def convolve(name, x, w, b):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (2, 1), ((0, 1), (1, 0)), dimension_numbers=numbers) + b


def cnn(p, x, product=convolve):
    return jnp.sum((jnp.tanh(product("w", x, p["w"], p["b"])) - 0.3) ** 2, axis=(1, 2, 3))


def patches(x, w):
    """The patches of `convolve`, channel first, as (positions, C K1 K2)."""
    x = np.pad(np.asarray(x), ((0, 1), (1, 0), (0, 0)))
    K1, K2 = w.shape[:2]
    rows = [
        x[i : i + K1, j : j + K2].transpose(2, 0, 1).ravel()
        for i in range(0, x.shape[0] - K1 + 1, 2)
        for j in range(x.shape[1] - K2 + 1)
    ]
    return np.array(rows)


def oracle(model, params, x, unfold=lambda x, w: x.reshape(-1, x.shape[-1])):
    """For each product the inputs and gradients of the loss of each example, (N, shared, d)."""
    base = convolve if model is cnn else dense
    rows = {}
    for example in x:

        def loss(probes, seen, example=example):
            def product(at, x, w, b):
                y = base(at, x, w, b)
                seen[at] = unfold(lax.stop_gradient(x)[0], w), y.shape
                return y + probes.get(at, 0.0)

            return model(params, example[None], product)[0]

        seen = {}
        loss({}, seen)
        grads = jax.grad(loss)({name: jnp.zeros(shape) for name, (_, shape) in seen.items()}, {})
        for name, g in grads.items():
            a = np.asarray(seen[name][0])
            a = np.concatenate([a, np.ones_like(a[:, :1])], axis=1)  # the bias
            rows.setdefault(name, []).append((a, np.asarray(g).reshape(-1, g.shape[-1])))
    return {
        name: [np.array(part) for part in zip(*found, strict=True)] for name, found in rows.items()
    }


def factors(A, B, kfac_approx):
    """U and G of rows (N, shared, d) of the losses of single examples."""
    n = len(A)
    if kfac_approx == "reduce":
        A, B = A.mean(1, keepdims=True), B.sum(1, keepdims=True)
    A, B = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    return A.T @ A / len(A), B.T @ B / n


def measured(loss, params, *batch, has_aux=False, **options):
    """The value, gradient, and U and G (which KFAC measures with K = C = I) of each layer."""
    layers = singd_jax.find_layers(loss, **options)(params, *batch)
    tx = singd_jax.singd(layers=layers, kfac=True, T=1)
    function = jax.jit(singd_jax.value_and_curvature(loss, layers, has_aux=has_aux))
    value, grads, curvature = function(params, tx.init(params), *batch)
    dense = {
        k: (np.asarray(c.H_K.dense()), np.asarray(c.H_C.dense())) for k, c in curvature.items()
    }
    return value, grads, dense


def mlp_params():
    return {"v": array(4, 5), "a": array(5), "w": array(5, 3), "b": array(3)}


def close(got, expected):
    # float32, sums of at most 60 products
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
