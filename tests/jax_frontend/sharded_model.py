"""A model, where meshes of eight devices place it, and the steps of its optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import singd_jax


def array(*shape):
    rng = np.random.default_rng(list(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32) * 0.5


PARAMS = {"v": array(4, 8), "a": array(8), "w": array(2, 8, 8), "b": array(2, 8), "s": array(8)}
X, BATCH = array(16, 4), 16
GAPS = {"T": 2, "growing_T": False}
SPECS = {"v": P(None, "model"), "a": P("model"), "w": P(None, "model"), "b": P(), "s": P()}
FSDP_TP = {
    "v": P("data", "model"),
    "a": P("model"),
    "w": P(None, "data", "model"),
    "b": P(None, "model"),
    "s": P("data"),
}


def model(p, x):
    x = jnp.tanh(x @ p["v"] + p["a"])
    x, _ = jax.lax.scan(lambda x, l: (jnp.tanh(x @ l[0] + l[1]), None), x, (p["w"], p["b"]))
    return jnp.sum((x * p["s"] - 0.3) ** 2, axis=1)


def loss(p, x):
    return jnp.mean(model(p, x))


def steps(
    loss, params, x, structures, place=lambda state: state, wrap=lambda f: f, rows=None, **options
):
    """The parameters after three steps, as NumPy."""
    layers = singd_jax.find_layers(loss, **options)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, structures=structures, rows=rows, **GAPS)

    def step(params, state, x):
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    step = jax.jit(wrap(step))
    state = place(tx.init(params))
    for _ in range(3):
        params, state = step(params, state, x)
    assert int(state.core.skipped) == 0
    return jax.tree.map(np.asarray, params)


def gap(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) for a, b in pairs)


def placed(mesh, x_spec, specs):
    params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in PARAMS.items()}
    return params, jax.device_put(X, NamedSharding(mesh, x_spec))


def factors_sharded(mesh, state):
    """Every factor whose last axis the mesh divides is sharded along it."""

    def place(leaf):
        spec = P(*[None] * (leaf.ndim - 1), "model") if leaf.ndim and leaf.shape[-1] == 8 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)
