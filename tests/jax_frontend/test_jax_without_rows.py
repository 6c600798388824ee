"""Leaves that show no rows: without layers, and beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import singd_jax
from singd_core import Optimizer
from singd_core.rules.shampoo import Shampoo

# Relative to the largest entry, float32: products in another order, and divisions by small numbers.
CLOSE = 1e-4
SHAPES = {"w": (8, 16), "experts": (3, 16, 16), "kernel": (2, 2, 4, 4), "b": (16,), "o": (16, 4)}


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.standard_normal(s) / 4, jnp.float32) for k, s in SHAPES.items()}


def gradients(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(n)
    ]


def run(tx: Any, given: list[dict[str, Any]], params: Any = None) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    params = start() if params is None else params
    state = tx.init(params)
    for grads in given:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * float(np.max(np.abs(b))))


def test_steps_are_those_of_the_pure_optimizer() -> None:
    data = gradients(23)  # the third gap is of two steps
    found, _ = run(singd_jax.singd(), data)
    pure, params = Optimizer({}), {k: np.asarray(a) for k, a in start().items()}
    state = pure.init(params)
    for grads in data:
        updates, state = pure.update(grads, state, params)
        params = pure.apply(params, updates)
    assert_close({k: found[k] for k in SHAPES}, params)


def test_it_is_used_as_adamw_is() -> None:
    """Under scan and jit, with a schedule, in a chain, and for a group of parameters."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    y = jnp.argmax(x[:, :4], 1)
    params = {k: start()[k] for k in ("w", "b", "o")}

    def loss(p: Any) -> Any:
        logits = jnp.tanh(x @ p["w"] + p["b"]) @ p["o"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def trained(tx: Any) -> float:
        def step(carry: Any, _: Any) -> Any:
            p, state = carry
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), value

        _, losses = jax.lax.scan(step, (params, tx.init(params)), None, length=40)
        return float(losses[-1])

    rate = optax.linear_schedule(0.12, 0.0, 40)
    best = trained(optax.adamw(optax.linear_schedule(0.01, 0.0, 40)))
    assert trained(optax.chain(optax.clip_by_global_norm(1.0), singd_jax.singd(rate))) < best
    groups = {"ours": singd_jax.singd(), "theirs": optax.adamw(0.01)}
    labels = {"w": "ours", "b": "theirs", "o": "ours"}
    assert trained(optax.multi_transform(groups, labels)) < best


def test_what_is_not_finite_changes_nothing() -> None:
    data = [{k: grads[k] for k in ("experts", "b")} for grads in gradients(3)]
    data[2]["experts"][1, 2, 3] = np.nan
    params = {k: start()[k] for k in ("experts", "b")}
    (before, old), (after, new) = (run(singd_jax.singd(), data[:n], params) for n in (2, 3))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    assert int(new.core.skipped) == 1
    for name, layer in new.core.layers.items():
        pairs = zip(layer.named_arrays(), old.core.layers[name].named_arrays(), strict=True)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_the_state_goes_to_a_file_and_back() -> None:
    data = [{k: grads[k] for k in ("w", "b")} for grads in gradients(4)]
    tx = singd_jax.singd(momentum=0.0)
    params, state = run(tx, data, {k: start()[k] for k in ("w", "b")})
    update, restored = jax.jit(tx.update), singd_jax.unflatten(tx.init(params), flat(state))
    assert_close(update(data[0], restored, params), update(data[0], state, params))


def flat(state: Any) -> dict[str, Any]:
    """What a file keeps of a state."""
    return {name: np.asarray(a) for name, a in singd_jax.flatten(state).items()}


def test_layers_and_others_learn_side_by_side() -> None:
    """A weight that is computed from two others shows no rows of them."""
    params = start()
    x = jnp.asarray(np.random.default_rng(2).standard_normal((32, 8)), jnp.float32)

    def loss(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.mean((h @ (p["experts"][0] @ p["o"]) - x[:, :4]) ** 2)

    layers = singd_jax.find_layers(loss)(params, x)
    lines = [line.split() for line in str(layers).splitlines()[1:]]
    kinds = {words[0]: words[2:4] for words in lines if words[1] != "+"}
    assert kinds["experts"] == kinds["o"] == kinds["kernel"] == ["no", "rows"]
    tx = singd_jax.singd(layers=layers)
    state = tx.init(params)
    by_gradients = {
        name for name, one in state.core.layers.items() if isinstance(one.factors, Shampoo)
    }
    assert by_gradients == {"experts", "o", "kernel"}
    assert set(state.core.layers) == {"w", *by_gradients}

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        value, grads, curvature = singd_jax.value_and_curvature(loss, layers)(p, state, x)
        updates, state = tx.update(grads, state, p, curvature=curvature)
        return optax.apply_updates(p, updates), state, value

    losses = []
    for _ in range(40):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 10
    assert np.array_equal(params["kernel"], start()["kernel"])  # which the loss does not read


@pytest.mark.parametrize("given", [{"recipe": "paper"}, {"kfac": True}], ids=str)
def test_adamw_trains_them_as_the_paper_does(given: dict[str, Any]) -> None:
    state = singd_jax.singd(**given).init(start())
    assert set(state.core.fallback) == set(SHAPES)
