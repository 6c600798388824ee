"""A model in jax and the same in torch, with copied weights, take the same steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from flax import linen
from jax_cases import IMAGES, SEQUENCE, X, mean_square

import singd_jax

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from singd_torch import SINGD  # noqa: E402

STEPS = 10
TOKENS = np.random.default_rng(0).integers(0, 7, (6, 3))
STRUCTURES = [
    "dense",
    "diagonal",
    "blockdiagonal:2",
    "tril",
    "triu",
    "triltoeplitz",
    "triutoeplitz",
    "trilbottomrightdiag:2",
    "triltopleftdiag:2",
    "triubottomrightdiag:2",
    "triutopleftdiag:2",
    "hierarchical:2,1",
]
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


@pytest.fixture(autouse=True)
def fresh_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# Mirror images of others.
MIRRORED = {"triu", "triutoeplitz", "triubottomrightdiag:2", "triutopleftdiag:2"}


@pytest.mark.parametrize(
    "structure",
    [pytest.param(s, marks=pytest.mark.slow) if s in MIRRORED else s for s in STRUCTURES],
)
def test_an_mlp_takes_the_steps_of_torch(structure):
    compare(mlp(), **PAPER, T=1, structures=(structure, structure))


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "normalized"},
        {"recipe": "normalized", "warmup": 3, "T": 3, "growing_T": False},
        {"recipe": "normalized", "structures": ("diagonal", "dense")},
        {"recipe": "normalized", "decoupled_weight_decay": False, "weight_decay": 0.1},
        PAPER | {"kfac": True, "T": 2},
        PAPER | {"normalize_lr_cov": True, "T": 2},
    ],
    ids=["normalized", "T=3", "diagonal", "coupled", "kfac", "normalized factor steps"],
)
def test_each_rule_means_what_it_means_in_torch(given):
    compare(mlp(), **given)


@pytest.mark.parametrize("make", [cnn, transformer])
def test_a_cnn_and_a_transformer_take_the_steps_of_torch(make):
    compare(make(), recipe="normalized", T=2, growing_T=False)


@pytest.mark.parametrize("make", [cnn, transformer])
def test_reduced_rows_are_those_of_torch(make):
    # Not with the recipe "normalized": the gradients of keys add up to zero over positions, and a
    # start and damping relative to nothing make factors of rounding errors.
    compare(make(), **PAPER, T=2, kfac_approx="reduce")


@pytest.mark.parametrize("given", [{"recipe": "normalized"}, PAPER | {"T": 1}])
def test_a_tied_table_takes_the_steps_of_torch(given):
    compare(tied(), **given)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("make", [cnn, transformer, tied])
def test_every_structure_takes_the_steps_of_torch(make, structure):
    compare(make(), **PAPER, T=2, structures=(structure, structure))


# Each kind of model once, with one of the recipes.
FAST = {("normalized", cnn), ("normalized", tied), ("paper", transformer), ("paper", attention)}
FAST |= {("paper", table)}


@pytest.mark.parametrize(
    ("recipe", "make"),
    cases(
        itertools.product(["normalized", "paper"], [transformer, attention, cnn, tied, table]),
        fast=FAST,
    ),
)
def test_a_run_saved_by_torch_goes_on_in_jax(recipe, make):
    twin = make()
    x, torch_x = batches(twin)
    optimizer = SINGD(twin.model, lr=0.05, recipe=recipe, T=3)
    torch_steps(twin, optimizer, torch_x, 4)

    params = twin.params
    layers = singd_jax.find_layers(twin.loss)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, recipe=recipe, T=3)
    packed = [name for name in layers if name.startswith("w[")]
    names = [packed or name if name == "w" else name for name, _ in twin.leaves]
    flat = singd_jax.from_torch(optimizer.state_dict(), names, layers)
    state = singd_jax.unflatten(tx.init(params), flat)

    params, _ = jax_steps(twin, tx, layers, params, state, x, 3)
    torch_steps(twin, optimizer, torch_x, 3)
    for name, expected in twin.params.items():
        np.testing.assert_allclose(params[name], expected, atol=1e-5, rtol=1e-5)


def saved_mlp(dtype=torch.float32):
    twin = mlp()
    layers = singd_jax.find_layers(twin.loss)(twin.params, X)
    twin.model.to(dtype)
    optimizer = SINGD(twin.model, lr=0.05)
    torch_steps(twin, optimizer, torch.from_numpy(np.array(X)).to(dtype), 2)
    return optimizer.state_dict(), layers


def test_names_for_a_saved_run_are_checked():
    saved, layers = saved_mlp()
    with pytest.raises(ValueError, match="names has 1 entries"):
        singd_jax.from_torch(saved, ["v"], layers)
    with pytest.raises(
        ValueError, match=r"names\[0\] = 'scale': it has a momentum, and the layers"
    ):
        singd_jax.from_torch(saved, ["scale", "a", "w", "b"], layers)
    with pytest.raises(
        ValueError, match=r"names\[0\] = 'w': .* \(5, 4\), where 1 of 3 × 5 numbers"
    ):
        singd_jax.from_torch(saved, ["w", "b", "v", "a"], layers)
    with pytest.raises(ValueError, match=r"names\[1\] = \['a', 'b'\]: .* \(5,\), where 2 of 5 × 1"):
        singd_jax.from_torch(saved, ["v", ["a", "b"], "w", "b"], layers)
    del saved["state"][0]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"names\[0\] = \['q', 'k'\]: .* 2 packed layers"):
        singd_jax.from_torch(saved, [["q", "k"], "a", "w", "b"], layers)


def test_packed_momenta_are_divided_among_parameters_of_their_own():
    def heads(p, x):
        q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in ("q", "k", "v"))
        return mean_square(q * k) + mean_square(v)

    params = {name: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for name in ("q", "k", "v")}
    layers = singd_jax.find_layers(heads)(params, SEQUENCE)
    twin = attention()
    optimizer = SINGD(twin.model, lr=0.05)
    torch_steps(twin, optimizer, batches(twin)[1], 2)
    saved = optimizer.state_dict()
    saved["state"] = {i: saved["state"][i] for i in (0, 1)}
    names = [[f"{name}.{leaf}" for name in params] for leaf in ("kernel", "bias")]
    flat = singd_jax.from_torch(saved, names, layers)
    state = singd_jax.unflatten(singd_jax.singd(layers=layers).init(params), flat)
    for i, name in enumerate(params):
        for momentum, j in zip(state.core.layers[f"{name}.kernel"].momenta, (0, 1), strict=True):
            expected = saved["state"][j]["momentum_buffer"].chunk(3)[i]
            np.testing.assert_array_equal(momentum, expected.numpy().T)


def test_a_run_in_bfloat16_keeps_its_dtypes():
    saved, layers = saved_mlp(torch.bfloat16)
    flat = singd_jax.from_torch(saved, ["v", "a", "w", "b"], layers)
    for name, index in {"v.momentum_buffer": 0, "v.bias_momentum_buffer": 1}.items():
        expected = saved["state"][index]["momentum_buffer"]
        assert flat[name].dtype == "bfloat16"
        np.testing.assert_array_equal(flat[name].astype("float32"), expected.float().numpy().T)
