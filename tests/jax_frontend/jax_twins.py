"""Models in jax and the same in torch, with copied weights, and their steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax_cases import IMAGES, SEQUENCE, X, mean_square

import singd_jax

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from singd_torch import SINGD  # noqa: E402

STEPS = 10
TOKENS = np.random.default_rng(0).integers(0, 7, (6, 3))
PAPER = {"recipe": "paper", "lr": 0.05, "damping": 0.1, "weight_decay": 0.01, "lr_cov": 0.02}


class Twin:
    """A torch model and its parameters in jax.

    Args:
        model: The torch model.
        leaves: For each of its parameters the name in jax, and how it is laid out there.
        apply: The model in jax, of a flat dictionary of parameters.
    """

    def __init__(self, model, leaves, apply):
        self.model, self.leaves, self.apply = model, leaves, apply

    @property
    def params(self):
        return {
            name: jnp.asarray(to_jax(p.detach().numpy().copy()))
            for (name, to_jax), p in zip(self.leaves, self.model.parameters(), strict=True)
        }

    def loss(self, params, x):
        return mean_square(self.apply(params, x))


def kernel(w):
    return w.T


def same(b):
    return b


def mlp() -> Twin:
    def apply(p, x):
        return jnp.tanh(x @ p["v"] + p["a"]) @ p["w"] + p["b"]

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Twin(model, [("v", kernel), ("a", same), ("w", kernel), ("b", same)], apply)


class TorchCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2, dilation=(1, 2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.grouped(torch.tanh(self.first(x)))).mean((2, 3)))


def cnn() -> Twin:
    def convolve(x, w, b, **how):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **how) + b

    def apply(p, x):
        x = jnp.tanh(convolve(x, p["first"], p["a"], window_strides=(2, 2), padding=[(1, 1)] * 2))
        grouped = {"rhs_dilation": (1, 2), "feature_group_count": 2}
        x = convolve(x, p["grouped"], p["b"], window_strides=(1, 1), padding="VALID", **grouped)
        return jnp.tanh(x).mean((1, 2)) @ p["last"] + p["c"]

    def hwio(w):
        return w.transpose(2, 3, 1, 0)

    names = [("first", hwio), ("a", same), ("grouped", hwio), ("b", same)]
    return Twin(TorchCNN(), [*names, ("last", kernel), ("c", same)], apply)


class TorchTransformer(nn.Module):
    def __init__(self, d=4, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 6), nn.Linear(6, d)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + self.out((a @ v).transpose(1, 2).flatten(2))
        return self.down(torch.tanh(self.up(x)))


def transformer() -> Twin:
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            y = linen.LayerNorm(name="norm")(x)
            x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
            return linen.Dense(4, name="down")(jnp.tanh(linen.Dense(6, name="up")(x)))

    leaves = [("norm.scale", same), ("norm.bias", same)]
    for name in ("query", "key", "value"):
        leaves.append((f"attention.{name}.kernel", lambda w: w.T.reshape(4, 2, 2)))
        leaves.append((f"attention.{name}.bias", lambda b: b.reshape(2, 2)))
    leaves += [
        ("attention.out.kernel", lambda w: w.T.reshape(2, 2, 4)),
        ("attention.out.bias", same),
    ]
    for name in ("up", "down"):
        leaves += [(f"{name}.kernel", kernel), (f"{name}.bias", same)]

    def apply(p, x):
        nested: dict = {}
        for name, leaf in p.items():
            *path, last = name.split(".")
            at = nested
            for part in path:
                at = at.setdefault(part, {})
            at[last] = leaf
        return Model().apply({"params": nested}, x)

    return Twin(TorchTransformer(), leaves, apply)


class TorchTied(nn.Module):
    """A table of embeddings that is the last layer too."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.last = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.last.weight = self.table.weight

    def forward(self, tokens):
        return self.last(torch.tanh(self.hidden(self.table(tokens))))


def tied() -> Twin:
    def apply(p, tokens):
        x = jnp.tanh(p["table"][tokens] @ p["w"] + p["b"])
        return x @ p["table"].T + p["c"]

    return Twin(TorchTied(), [("table", same), ("w", kernel), ("b", same), ("c", same)], apply)


def table() -> Twin:
    """A table of embeddings that is used as nothing else."""

    def apply(p, tokens):
        return jnp.tanh(p["table"][tokens]) @ p["w"] + p["b"]

    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3))
    return Twin(model, [("table", same), ("w", kernel), ("b", same)], apply)


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def attention() -> Twin:
    """Query, key and value are slices of one leaf."""

    def apply(p, x):
        parts = [slice(4 * i, 4 * i + 4) for i in range(3)]
        q, k, v = ((x @ p["w"][:, i] + p["b"][i]).reshape(*x.shape[:2], 2, 2) for i in parts)
        a = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k) / 2**0.5)
        return jnp.einsum("bhst,bthd->bshd", a, v).reshape(x.shape) @ p["out"] + p["c"]

    return Twin(TorchAttention(), [("w", kernel), ("b", same), ("out", kernel), ("c", same)], apply)


def torch_steps(twin, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        z = torch.tanh(twin.model(x)) - 0.3
        z.square().flatten(1).sum(1).mean().backward()
        optimizer.step()


def jax_steps(twin, tx, layers, params, state, x, steps):
    @jax.jit
    def step(params, state, x):
        _, grads, curvature = singd_jax.value_and_curvature(twin.loss, layers)(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, x)
    return params, state


def batches(twin):
    x = {"Sequential": X, "TorchCNN": IMAGES, "TorchTied": TOKENS}
    x = x.get(type(twin.model).__name__, SEQUENCE)
    x = np.array(TOKENS if dict(twin.leaves).keys() >= {"table"} else x)
    return jnp.asarray(x), torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)


def compare(twin, *, tolerance=1e-5, **given):
    """Ten steps with both."""
    x, torch_x = batches(twin)
    params = twin.params
    lr = given.pop("lr", 0.05)
    how = {k: given.pop(k) for k in ("kfac_approx", "loss_average") if k in given}
    structures = given.pop("structures", ("dense", "dense"))
    layers = singd_jax.find_layers(twin.loss, **how)(params, x)
    tx = singd_jax.singd(lr, layers=layers, structures=structures, **given)
    params, state = jax_steps(twin, tx, layers, params, tx.init(params), x, STEPS)
    start = twin.params
    optimizer = SINGD(twin.model, lr=lr, structures=structures, **how, **given)
    torch_steps(twin, optimizer, torch_x, STEPS)
    assert int(state.core.skipped) == optimizer.skipped == 0
    for name, expected in twin.params.items():
        scale = np.abs(expected).max()
        assert np.abs(expected - start[name]).max() > 1e-3 * scale  # it has moved
        np.testing.assert_allclose(params[name], expected, atol=tolerance * scale, rtol=0.0)
