"""Losses whose parameters are rearranged before they multiply."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax_cases import SEQUENCE, Case, N, X, array, case, mean_square


@case
def head_split_kernels() -> Case:
    def loss(p, x):
        q = jnp.einsum("bsd,dhk->bshk", x, p["q"]) + p["c"]
        k = jnp.einsum("bsd,hkd->bhks", x, p["k"])
        a = jax.nn.softmax(jnp.einsum("bshk,bhkt->bhst", q, k))
        y = jnp.einsum("bhst,bthk->bshk", a, q)
        return mean_square(jnp.einsum("bshk,hkd->bsd", y, p["o"]) + p["b"])

    params = {
        "q": array(4, 2, 3),
        "c": array(2, 3),
        "k": array(2, 3, 4),
        "o": array(2, 3, 4, seed=1),
        "b": array(4),
    }
    return Case(loss, params, (SEQUENCE,), {"q", "k", "o"})


@case
def reshaped_kernel() -> Case:
    def loss(p, x):
        w = p["w"].transpose(1, 0, 2).reshape(6, 4)  # (heads, width, out) of (width, heads, out)
        y = jnp.concatenate([x, x[:, :2]], axis=1) @ w
        return mean_square(y + p["b"].reshape(2, 2).T.reshape(4))

    return Case(loss, {"w": array(3, 2, 4), "b": array(4)}, (X,), {"w"})


@case
def experts() -> Case:
    def loss(p, x):
        gate = jax.nn.softmax(x @ p["gate"])
        y = jnp.einsum("bi,eio->ebo", x, p["w"]) + p["b"][:, None, :]
        return mean_square(jnp.einsum("be,ebo->bo", gate, y))

    params = {"gate": array(4, 2), "w": array(2, 4, 3), "b": array(2, 3)}
    return Case(loss, params, (X,), {"gate", "w"})


@case
def tied_transposed() -> Case:
    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"])

    params = {"w": array(4, 3), "b": array(3), "c": array(4)}
    return Case(loss, params, (X,), {"w"}, {"c"})


@case
def packed_qkv_sliced() -> Case:
    def loss(p, x):
        q, k, v = (x @ p["w"][:, 4 * i : 4 * i + 4] + p["b"][4 * i : 4 * i + 4] for i in range(3))
        return mean_square(jax.nn.softmax(q @ k.mT) @ v)

    layers = {"w[:,0:4]", "w[:,4:8]", "w[:,8:12]"}
    return Case(loss, {"w": array(4, 12), "b": array(12)}, (SEQUENCE,), layers)


@case
def packed_qkv_split() -> Case:
    def loss(p, x):
        q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        return mean_square(jax.nn.softmax(q @ k.mT) @ v)

    return Case(loss, {"w": array(4, 12), "b": array(12)}, (SEQUENCE,), {"w"})


@case
def split_weight() -> Case:
    def loss(p, x):
        v, w = jnp.split(p["w"], 2)
        return mean_square(jnp.tanh(x @ v) @ w)

    return Case(loss, {"w": array(8, 4)}, (X,), {"w[0:4,:]", "w[4:8,:]"})


@case
def stacked_leaf_in_a_loop() -> Case:
    def loss(p, x):
        for i in range(2):
            x = jnp.tanh(x @ p["w"][i] + p["b"][i])
        return mean_square(x)

    layers = {"w[0,:,:]", "w[1,:,:]"}
    return Case(loss, {"w": array(2, 4, 4), "b": array(2, 4)}, (X,), layers)


@case
def concatenated_outputs() -> Case:
    def loss(p, x):
        w = jnp.concatenate([p["v"], p["w"]], axis=1)
        b = jnp.concatenate([p["a"], p["b"]])
        return mean_square(x @ w + b)

    params = {"v": array(4, 3), "w": array(4, 2), "a": array(3), "b": array(2)}
    return Case(loss, params, (X,), {"v", "w"})


@case
def concatenated_inputs() -> Case:
    def loss(p, x):
        w = jnp.concatenate([p["v"], p["w"]], axis=0)
        return mean_square(x @ w)

    return Case(loss, {"v": array(3, 3), "w": array(1, 3)}, (X,), {"v", "w"})


@case
def linen_lstm() -> Case:
    model = nn.RNN(nn.OptimizedLSTMCell(3))
    params = model.init(jax.random.key(0), SEQUENCE)

    def loss(params, x):
        return mean_square(model.apply(params, x))

    cell = "params.cell."
    layers = {f"{cell}{part}{gate}.kernel" for part in "hi" for gate in "figo"}
    return Case(loss, params, (SEQUENCE,), layers)


@case
def embedding() -> Case:
    def loss(p, tokens):
        return mean_square(p["table"][tokens] @ p["w"])

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (N, 3)))
    return Case(loss, {"table": array(7, 4), "w": array(4, 3)}, (tokens,), {"table", "w"})


@case
def embedding_by_single_indices() -> Case:
    def loss(p, tokens):
        rows = jax.vmap(jax.vmap(lambda i: p["table"][i]))(tokens)
        return mean_square(rows @ p["w"])

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (N, 3)))
    return Case(loss, {"table": array(7, 4), "w": array(4, 3)}, (tokens,), {"table", "w"})


@case
def scanned_otherwise_besides() -> Case:
    def loss(p, x):
        norms = jax.lax.map(jnp.linalg.norm, p["w"])
        return mean_square(x @ p["w"]) + 0.1 * jnp.sum(norms)

    return Case(loss, {"w": array(4, 3)}, (X,), {"w"})


@case
def returned_by_a_cond() -> Case:
    def loss(p, x):
        w = jax.lax.cond(x[0, 0] > 0, lambda w, v: w, lambda w, v: v, p["w"], p["v"])
        w, u = jax.lax.optimization_barrier((w, p["u"]))
        return mean_square(x @ w + x @ u)

    params = {"w": array(4, 3), "v": array(4, 3), "u": array(4, 3)}
    return Case(loss, params, (X,), {"u"}, {"w", "v"})


@case
def tied_embedding() -> Case:
    model = nn.Embed(7, 4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (N, 3)))
    params = model.init(jax.random.key(0), tokens)

    def loss(params, tokens):
        return mean_square(model.apply(params, model.apply(params, tokens), method="attend"))

    return Case(loss, params, (tokens,), {"params.embedding"})


@case
def penalized() -> Case:
    def loss(p, x):
        return mean_square(x @ p["w"]) + 0.1 * jnp.sum(p["w"] ** 2)

    return Case(loss, {"w": array(4, 3)}, (X,), {"w"})


@case
def scaled_weight() -> Case:
    def loss(p, x):
        return mean_square(x @ (p["w"] * p["c"]) + x @ p["v"])

    return Case(loss, {"w": array(4, 3), "c": array(3), "v": array(4, 3)}, (X,), {"v"}, {"w", "c"})


@case
def reversed_weight() -> Case:
    return Case(lambda p, x: mean_square(x @ p["w"][::-1]), {"w": array(4, 3)}, (X,), {"w"})
