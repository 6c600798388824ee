"""Equal calls under `jax.checkpoint` are traced once, and each has a curvature of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cases import X, array, mean_square

import singd_jax
from singd_jax import _tapped


def params(n: int = 4) -> Any:
    own = {"w": (4, 4), "b": (4,), "s": (4,)}
    return [{k: 0.5 + array(*v, seed=i + n) for k, v in own.items()} for i in range(n)]


def block(x: Any, w: Any, b: Any, s: Any) -> Any:
    return x + jnp.tanh(x @ w + b) * s


def product(x: Any, w: Any) -> Any:
    return x @ w


@jax.custom_vjp
def ruled(x: Any, w: Any) -> Any:
    return x @ w


ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))


def ruled_block(x: Any, w: Any, b: Any, s: Any) -> Any:
    return x + jnp.tanh(ruled(x, w) + b) * s


def loss(p: Any, x: Any, f: Any = block, kind: str = "own") -> Any:
    for i, own in enumerate(p):
        w, b = own["w"], own["b"]
        if kind == "bias outside":
            x = x + jnp.tanh(f(x, w) + b) * own["s"]
            continue
        if kind == "scaled" and i % 2:
            w = w * 2.0
        if kind == "tied bias" and i == 2:
            b = p[0]["b"]
        if kind == "tied weight" and i == 2:
            w = p[1]["w"]
        if kind == "tied with one outside" and i:
            x, b = jnp.tanh(x @ w), p[i - 1]["b"]
        x = f(x, w, b, own["s"])
    return mean_square(x @ p[2]["w"].T if kind == "transposed" else x)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
KINDS = [
    slow("own"),
    slow("scaled"),
    slow("tied bias"),
    slow("tied weight"),
    "bias outside",
    "tied with one outside",
    slow("transposed"),
    "ruled",
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_has_the_curvature_that_it_has_without_a_checkpoint(kind: str) -> None:
    found = []
    made = {"bias outside": product, "ruled": ruled_block}.get(kind, block)
    for f in (made, jax.checkpoint(made)):
        of = functools.partial(loss, f=f, kind=kind)
        layers = singd_jax.find_layers(of, structures="diagonal")(params(), X)
        state = singd_jax.singd(layers=layers).init(params())
        found.append(
            (layers, *jax.jit(singd_jax.value_and_curvature(of, layers))(params(), state, X))
        )
    assert str(found[1][0]) == str(found[0][0])
    for a, b in zip(*(jax.tree.leaves(own[1:]) for own in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    weights = [c.H_C.diag for c in found[1][3].values()]
    assert len({tuple(np.asarray(d).tolist()) for d in weights}) == len(weights)


def test_one_of_them_is_tapped(monkeypatch: pytest.MonkeyPatch) -> None:
    taps, tap = [], _tapped.tap
    monkeypatch.setattr(_tapped, "tap", lambda *given: taps.append(given) or tap(*given))
    of = functools.partial(loss, f=jax.checkpoint(block))
    layers = singd_jax.find_layers(of)(params(), X)
    state = singd_jax.singd(layers=layers).init(params())
    for _ in range(2):
        jax.jit(singd_jax.value_and_curvature(of, layers)).lower(params(), state, X)
    assert len(taps) == 2
