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
