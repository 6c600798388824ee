"""Transformer blocks in the idioms of well-known projects, each a loss with its parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax_cases import array

B, S, D, H, G, W, F, V, L, E = 2, 5, 16, 4, 2, 4, 24, 32, 3, 3  # G heads of keys; W wide; E experts
TOKENS = jnp.arange(B * S).reshape(B, S) % V
MASK = jnp.tril(jnp.ones((S, S), bool))

IDIOMS: dict[str, Callable[[], tuple[Callable[..., Any], Any]]] = {}


def idiom(make: Callable[[], Any]) -> Callable[[], Any]:
    IDIOMS[make.__name__] = make
    return make


def cross_entropy(logits: Any, tokens: Any) -> Any:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
    return -jnp.mean(chosen)


def rms(x: Any, scale: Any, one: float = 0.0) -> Any:
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (one + scale)


def rope(x: Any) -> Any:
    angle = jnp.arange(S)[:, None] / 1e4 ** (jnp.arange(W // 2) / (W // 2))
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q: Any, k: Any, v: Any) -> Any:
    k, v = (jnp.repeat(z, q.shape[2] // z.shape[2], 2) for z in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", rope(q) * W**-0.5, rope(k))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(MASK, scores, -1e9)), v)


@idiom
def maxtext() -> Any:
    """Layers stacked along the second axis, `dot_general` on heads, casts, named checkpoints."""

    def block(x, w):
        w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), w)
        h = rms(x, w["n1"])
        q, k, v = (
            checkpoint_name(lax.dot_general(h, w[n], (((2,), (0,)), ((), ()))), n) for n in "qkv"
        )
        y = attention(q, k, v).astype(x.dtype)
        x = x + lax.dot_general(y, w["o"], (((2, 3), (0, 1)), ((), ())))
        gate, up = jnp.moveaxis(jnp.einsum("bsd,dnf->bsnf", rms(x, w["n2"]), w["wi"]), 2, 0)
        return (x + (jax.nn.silu(gate) * up) @ w["wo"]).astype(jnp.bfloat16), None

    def loss(p, tokens):
        x = jnp.take(p["embed"].astype(jnp.bfloat16), tokens, axis=0)
        layers = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), p["layers"])
        x, _ = lax.scan(jax.checkpoint(block), x, layers)
        logits = rms(x, p["norm"]) @ p["head"].astype(x.dtype)
        return cross_entropy(logits.astype(jnp.float32), tokens)

    layers = {"q": array(D, L, H, W), "k": array(D, L, G, W), "v": array(D, L, G, W)}
    layers |= {"o": array(H, L, W, D), "wi": array(D, L, 2, F), "wo": array(F, L, D)}
    layers |= {"n1": jnp.ones((D, L)), "n2": jnp.ones((D, L))}
    params = {"embed": array(V, D), "layers": layers, "norm": jnp.ones(D), "head": array(D, V)}
    return loss, params


@idiom
def maxtext_experts() -> Any:
    """Tokens sorted by expert, `ragged_dot`, and a tied table."""

    def block(x, w):
        h = x.reshape(-1, D)
        top, chosen = lax.top_k(jax.nn.softmax(h @ w["gate"]), 2)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=E)
        rows = jnp.repeat(h, 2, 0)[order]
        y = jax.nn.silu(lax.ragged_dot(rows, w["wi0"], sizes))
        y = lax.ragged_dot(y * lax.ragged_dot(rows, w["wi1"], sizes), w["wo"], sizes)
        y = jnp.einsum("tkd,tk->td", y[jnp.argsort(order)].reshape(-1, 2, D), top)
        return x + y.reshape(x.shape), None

    def loss(p, tokens):
        x, _ = lax.scan(block, p["embed"][tokens] * math.sqrt(D), p["layers"])
        return cross_entropy(x @ p["embed"].T, tokens)

    layers = {"gate": array(L, D, E), "wi0": array(L, E, D, F), "wi1": array(L, E, D, F)}
    return loss, {"embed": array(V, D), "layers": layers | {"wo": array(L, E, F, D)}}


@idiom
def levanter() -> Any:
    """haliax's fold, which reads the first layer for its shapes alone; the weight comes first."""

    def block(x, w):
        h = rms(x, w["ln"])
        qkv = jnp.einsum("nhkd,bsd->bsnhk", w["qkv"], h) + w["qkv_bias"]
        y = attention(*(z[:, :, 0] for z in jnp.split(qkv, 3, 2)))
        x = x + jnp.einsum("dhk,bqhk->bqd", w["o"], y) + w["o_bias"]
        up = jax.nn.gelu(jnp.einsum("fd,bsd->bsf", w["up"], h) + w["up_bias"])
        return x + jnp.einsum("df,bsf->bsd", w["down"], up) + w["down_bias"], None

    def loss(p, tokens):
        x = jnp.take(p["wte"], tokens, axis=0) + p["wpe"][:S]
        jax.tree.map(lambda a: jnp.take(a, 0, axis=0), p["blocks"])
        x, _ = lax.scan(jax.checkpoint(block), x, p["blocks"])
        return cross_entropy(jnp.einsum("vd,bsd->bsv", p["wte"], rms(x, p["ln"])), tokens)

    blocks = {"qkv": array(L, 3, H, W, D), "qkv_bias": array(L, 3, H, W), "o": array(L, D, H, W)}
    blocks |= {"o_bias": array(L, D), "up": array(L, F, D), "up_bias": array(L, F)}
    blocks |= {"down": array(L, D, F), "down_bias": array(L, D), "ln": jnp.ones((L, D))}
    params = {"wte": array(V, D), "wpe": array(S, D), "blocks": blocks, "ln": jnp.ones(D)}
    return loss, params


@idiom
def levanter_chunked_loss() -> Any:
    """The head is applied to some positions at a time."""

    def loss(p, tokens):
        x = jnp.tanh(p["wte"][tokens] @ p["w"]).reshape(S, B, D)

        @jax.checkpoint
        def chunk(rows):
            x, tokens = rows
            return cross_entropy(x @ p["head"], tokens)

        return jnp.mean(lax.map(chunk, (x, tokens.reshape(S, B))))

    return loss, {"wte": array(V, D), "w": array(D, D), "head": array(D, V)}


@idiom
def gemma() -> Any:
    """Heads and gates in one einsum, `1 + scale`, a scaled and tied table, capped logits."""

    def loss(p, tokens):
        x = p["embed"][(tokens,)]
        x *= jnp.sqrt(D).astype(x.dtype)
        for w in p["layers"]:
            h = rms(x, w["n1"], 1.0)
            k, v = jnp.einsum("BSD,CKDH->CBSKH", h, w["kv"])
            y = attention(jnp.einsum("BTD,NDH->BTNH", h, w["q"]), k, v)
            x = x + jnp.einsum("BTNH,NHD->BTD", y, w["o"])
            gate = jnp.einsum("...F,NHF->...NH", rms(x, w["n2"], 1.0), w["gating"])
            x = x + (jax.nn.gelu(gate[..., 0, :]) * gate[..., 1, :]) @ w["linear"]
        logits = jnp.dot(rms(x, p["norm"], 1.0), p["embed"].T)
        return cross_entropy(30.0 * jnp.tanh(logits / 30.0), tokens)

    def layer(seed):
        w = {"q": array(H, D, W, seed=seed), "kv": array(2, G, D, W, seed=seed)}
        w |= {"o": array(H, W, D, seed=seed), "gating": array(2, F, D, seed=seed)}
        return w | {"linear": array(F, D, seed=seed), "n1": jnp.zeros(D), "n2": jnp.zeros(D)}

    return loss, {"embed": array(V, D), "layers": [layer(0), layer(1)], "norm": jnp.zeros(D)}


@idiom
def easylm() -> Any:
    """Flat kernels, sharding constraints, and a feed-forward layer in a scan over chunks."""
    mesh = jax.make_mesh((1,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def loss(p, tokens):
        x = jnp.take(p["wte"], tokens, axis=0)
        for w in p["h"]:
            h = rms(x, w["n"])
            q, k, v = (
                lax.with_sharding_constraint(jnp.dot(h, w[n]).reshape(B, S, H, W), spec)
                for n in ("wq", "wk", "wv")
            )
            x = x + attention(q, k, v).reshape(B, S, D) @ w["wo"]

            def feed(_, rows, w=w):
                return None, (jax.nn.silu(rows @ w["w1"]) * (rows @ w["w3"])) @ w["w2"]

            _, y = lax.scan(jax.checkpoint(feed), None, jnp.moveaxis(x, 1, 0))
            x = x + jnp.moveaxis(y, 0, 1)
        return cross_entropy(x @ p["head"], tokens)

    def layer(seed):
        w = {n: array(D, D, seed=seed + i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
        return w | {"w1": array(D, F), "w2": array(F, D), "w3": array(D, F), "n": jnp.ones(D)}

    return loss, {"wte": array(V, D), "h": [layer(0), layer(9)], "head": array(D, V)}


@idiom
def penzai() -> Any:
    """Named axes: everything positional is mapped away, and what is left is a `tensordot`."""

    def one(p, tokens):
        def along(w, x, axes=1):
            return jax.vmap(lambda row: jnp.tensordot(row, w, axes))(x)

        x = jax.vmap(lambda i: p["table"][i])(tokens) * D**0.5
        h = rms(x, p["scale"], 1.0)
        q, k, v = (along(p[n], h) for n in "qkv")
        scores = jnp.where(MASK, jnp.einsum("qgrd,kgd->grqk", q, k), -1e9)
        y = jnp.einsum("grqk,kgd->qgrd", jax.nn.softmax(scores), v)
        x = x + along(p["o"], y, 3)
        x = x + along(p["down"], jax.vmap(lambda u: jax.nn.gelu(u[0]) * u[1])(along(p["up"], x)))
        return jax.vmap(lambda row: jnp.tensordot(p["table"], row, 1))(x)

    def loss(p, tokens):
        return cross_entropy(jax.vmap(lambda own: one(p, own))(tokens), tokens)

    params = {"table": array(V, D), "q": array(D, G, H // G, W), "k": array(D, G, W)}
    params |= {"v": array(D, G, W), "o": array(G, H // G, W, D), "up": array(D, 2, F)}
    return loss, params | {"down": array(F, D), "scale": jnp.zeros(D)}


@idiom
def experts_of_fixed_capacity() -> Any:
    """Tokens sent to experts by one-hot products."""

    def loss(p, tokens):
        x = p["wte"][tokens].reshape(-1, D)
        share = jax.nn.softmax(x @ p["gate"])
        sent = jax.nn.one_hot(jnp.argmax(share, -1), E)[:, :, None] * jnp.eye(B * S)[:, None]
        rows = jax.nn.relu(jnp.einsum("ecd,edf->ecf", jnp.einsum("tec,td->ecd", sent, x), p["up"]))
        y = jnp.einsum("ecf,efd->ecd", rows, p["down"])
        y = jnp.einsum("tec,ecd->td", sent * share[:, :, None], y)
        return cross_entropy((y @ p["wte"].T).reshape(B, S, V), tokens)

    params = {"wte": array(V, D), "gate": array(D, E), "up": array(E, D, F)}
    return loss, params | {"down": array(E, F, D)}
