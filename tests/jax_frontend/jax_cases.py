"""Losses of unmodified models, a name for each thing that a user could do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import pallas

N = 6  # the batch size of all cases


@dataclasses.dataclass
class Case:
    """A loss with parameters and a batch; the layers that must be found, and what must not be."""

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    layers: set[str]
    others: set[str] = dataclasses.field(default_factory=set)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def array(*shape: int, seed: int = 0) -> Any:
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.standard_normal(shape), jnp.float32) * 0.5


def mean_square(z: Any) -> Any:
    """A mean over the batch of a loss without symmetry."""
    return jnp.mean(jnp.sum((jnp.tanh(z) - 0.3) ** 2, axis=tuple(range(1, z.ndim))))


X = array(N, 4)
SEQUENCE = array(N, 3, 4)
IMAGES = array(N, 5, 6, 2)

# ---- dense --------------------------------------------------------------------------------------


@case
def raw_mlp() -> Case:
    def loss(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return mean_square(x)

    params = [{"w": array(4, 5), "b": array(5)}, {"w": array(5, 3), "b": array(3)}]
    return Case(loss, params, (X,), {"0.w", "1.w"})


@case
def without_bias() -> Case:
    return Case(lambda p, x: mean_square(x @ p), array(4, 3), (X,), {"params"})


@case
def weight_first_under_vmap() -> Case:
    def loss(p, x):
        return mean_square(jax.vmap(lambda row: p["W"] @ row + p["b"])(x))

    return Case(loss, {"W": array(3, 4), "b": array(3)}, (X,), {"W"})


@case
def transposed_storage() -> Case:
    def loss(p, x):
        return mean_square(x @ p["W"].T + p["b"][None, :])

    return Case(loss, {"W": array(3, 4), "b": array(3)}, (X,), {"W"})


@case
def mixed_precision() -> Case:
    def loss(p, x):
        y = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return mean_square(y.astype(jnp.float32) + p["b"])

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"})


@case
def residual_before_bias() -> Case:
    def loss(p, x):
        return mean_square((x @ p["w"] + x) + p["b"])

    return Case(loss, {"w": array(4, 4), "b": array(4)}, (X,), {"w"})


@case
def on_sequences() -> Case:
    def loss(p, x):
        return mean_square(jnp.einsum("bsi,io->bso", x, p["w"]) + p["b"])

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (SEQUENCE,), {"w"})


@case
def bias_of_several_layers() -> Case:
    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["v"] + p["b"]) @ p["w"] + p["b"])

    params = {"v": array(4, 4), "w": array(4, 4, seed=1), "b": array(4)}
    return Case(loss, params, (X,), {"v", "w"}, {"b"})


@case
def output_read_before_its_bias() -> Case:
    def loss(p, x):
        y = x @ p["w"]
        return mean_square(y + p["b"]) + mean_square(y)

    return Case(loss, {"w": array(4, 3), "b": array(3)}, (X,), {"w"}, {"b"})


@case
def output_read_before_its_bias_inside_a_jit() -> Case:
    @jax.jit
    def inner(y, b):
        return mean_square(y + b) + mean_square(y)

    params = {"w": array(4, 3), "b": array(3)}
    return Case(lambda p, x: inner(x @ p["w"], p["b"]), params, (X,), {"w"}, {"b"})


@case
def used_twice_with_its_bias() -> Case:
    def loss(p, x):
        for _ in range(2):
            x = jnp.tanh(x @ p["w"] + p["b"])
        return mean_square(x)

    return Case(loss, {"w": array(4, 4), "b": array(4)}, (X,), {"w"})


@case
def arrays_without_entries() -> Case:
    def loss(p, x):
        y = x @ p["w"] + x[:, :0] @ p["z"] + x[:, :0] @ p["w"][:0]
        rest = (x[:0] @ p["w"]).reshape(3, 0)
        return mean_square(y) + jnp.sum(p["e"].reshape(6, 0)) + jnp.sum(rest)

    params = {"w": array(4, 3), "z": array(0, 3), "e": array(0, 6)}
    return Case(loss, params, (X,), {"w"}, {"z", "e"})


@case
def python_number() -> Case:
    def loss(p, x):
        return mean_square(p["s"] * (x @ p["w"] + p["b"]))

    params = {"w": array(4, 3), "b": array(3), "s": 2.0, "n": 3}
    return Case(loss, params, (X,), {"w"}, {"s"})


@case
def complex_numbers() -> Case:
    def loss(p, x):
        z = (x @ p["w"]).astype(jnp.complex64) @ p["c"] + 1j * x @ p["v"]
        return mean_square(z.real) + mean_square(z.imag)

    c = array(5, 3) + 1j * array(5, 3, seed=1)
    return Case(loss, {"w": array(4, 5), "c": c, "v": array(4, 3)}, (X,), {"w"}, {"c", "v"})


# ---- flax, Equinox ------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return nn.Dense(4)(nn.gelu(nn.Dense(5)(x + y)))


@case
def linen_transformer_block() -> Case:
    model = Block()
    params = model.init(jax.random.key(0), SEQUENCE)

    def loss(params, x):
        return mean_square(model.apply(params, x))

    block = "params.MultiHeadDotProductAttention_0."
    layers = {f"{block}{name}.kernel" for name in ("query", "key", "value", "out")}
    layers |= {"params.Dense_0.kernel", "params.Dense_1.kernel"}
    others = {"params.LayerNorm_0.scale", "params.LayerNorm_0.bias"}
    return Case(loss, params, (SEQUENCE,), layers, others)


@case
def nnx_mlp() -> Case:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(4, 5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)
            self.last = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))

    graph, params = nnx.split(Model(nnx.Rngs(0)))

    def loss(params, x):
        return mean_square(nnx.merge(graph, params)(x))

    layers = {"first.kernel", "last.kernel"}
    return Case(loss, params, (X,), layers, {"norm.scale", "norm.bias"})


@case
def equinox_mlp() -> Case:
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))

    def loss(model, x):
        return mean_square(jax.vmap(model)(x))

    return Case(loss, model, (X,), {"layers.0.weight", "layers.1.weight"})


# ---- control flow -------------------------------------------------------------------------------


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
