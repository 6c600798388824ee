"""Leaves that show no rows: without layers, and beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import singd_jax
from singd_core import Optimizer, rules
from singd_core.rules.shampoo import Shampoo

# Relative to the largest entry, float32: products in another order, and divisions by small numbers.
CLOSE = 1e-4
SHAPES = {"w": (8, 16), "experts": (3, 16, 16), "kernel": (2, 2, 4, 4), "b": (16,), "o": (16, 4)}
SHAPES |= {"w_in": (1, 16), "b_in": (16,)}


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


@pytest.mark.slow
def test_steps_are_those_of_the_pure_optimizer() -> None:
    data = gradients(23)  # the third gap is of two steps
    found, _ = run(singd_jax.singd(), data)

    def paired(leaves: Any) -> dict[str, Any]:
        """With the bias that names tell."""
        arrays = {k: np.asarray(leaves[k]) for k in SHAPES}
        pairs = {"w": "b", "w_in": "b_in"}
        return arrays | {w: (arrays[w], arrays.pop(b)) for w, b in pairs.items()}

    pure, params = Optimizer({}), paired(start())
    state = pure.init(params)
    for grads in map(paired, data):
        updates, state = pure.update(grads, state, params)
        params = pure.apply(params, updates)
    assert_close(paired(found), params)


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


@pytest.mark.slow
def test_the_state_goes_to_a_file_and_back() -> None:
    data = [{k: grads[k] for k in ("w", "b")} for grads in gradients(4)]
    tx = singd_jax.singd(momentum=0.0)
    params, state = run(tx, data, {k: start()[k] for k in ("w", "b")})
    update, restored = jax.jit(tx.update), singd_jax.unflatten(tx.init(params), flat(state))
    assert_close(update(data[0], restored, params), update(data[0], state, params))


def flat(state: Any) -> dict[str, Any]:
    """What a file keeps of a state."""
    return {name: np.asarray(a) for name, a in singd_jax.flatten(state).items()}


@pytest.mark.slow
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
    assert by_gradients == {"experts", "o", "kernel", "w_in"}
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


def test_names_tell_biases() -> None:
    """As flax has them: with heads, and along a first axis of a scan over layers."""
    shapes: dict[str, Any] = {
        "dense": {"kernel": (6, 4), "bias": (4,)},
        "query": {"kernel": (6, 2, 3), "bias": (2, 3)},
        "out": {"kernel": (2, 3, 6), "bias": (6,)},
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "scanned": {"kernel": (5, 6, 8), "bias": (5, 8)},
        "last": {"kernel": (6, 1), "bias": (1,)},
        "first": {"kernel": (1, 6), "bias": (6,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "alone": {"kernel": (6, 4)},
        "token": {"kernel": (1, 6)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    state = singd_jax.singd().init(params)
    expected = {
        "dense.kernel": ((), 4, 6),
        "query.kernel": ((), 6, 6),
        "out.kernel": ((), 6, 6),
        "conv.kernel": ((), 4, 18),
        "scanned.kernel": ((5,), 8, 6),
        "first.kernel": ((), 6, 1),
        "alone.kernel": ((), 6, 4),  # which side has the rows does not matter then
    }
    assert {name: layer.shape for name, layer in state.layers.items()} == expected
    pairs = {name for name, layer in state.layers.items() if layer.bias is not None}
    assert pairs == expected.keys() - {"alone.kernel"}
    assert set(state.core.fallback) == {
        *("norm.scale", "norm.bias", "token.kernel", "last.kernel", "last.bias"),
    }
    for name, own in state.core.layers.items():
        if name in pairs:
            stack, _, d_in = expected[name]
            assert own.factors.inputs.mean.shape == (*stack, d_in)  # type: ignore[attr-defined]


def test_a_shift_of_the_inputs_changes_no_step() -> None:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    y = jnp.asarray(np.tanh(rng.standard_normal((64, 5))), jnp.float32)
    found = []
    for shift in (0.0, 3.0):
        W = start()["w"][:, :5]
        params = {"kernel": W, "bias": -shift * W.sum(0)}
        tx = singd_jax.singd()
        state = tx.init(params)

        @jax.jit
        def step(p: Any, state: Any, x: Any) -> Any:
            grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"] - y) ** 2))(p)
            updates, state = tx.update(grads, state, p)  # noqa: B023
            return optax.apply_updates(p, updates), state

        for _ in range(15):
            params, state = step(params, state, x + shift)
        mean = state.core.layers["kernel"].factors.inputs.mean - shift  # type: ignore[attr-defined]
        found.append((params["kernel"], params["bias"] + shift * params["kernel"].sum(0), mean))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3)


def test_a_bias_that_is_left_out_is_none() -> None:
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    masked = optax.masked(singd_jax.singd(), {"kernel": True, "bias": False})
    tx = optax.chain(masked, optax.masked(optax.set_to_zero(), {"kernel": False, "bias": True}))
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert np.any(updates["kernel"])
    assert not np.any(updates["bias"])


def test_a_state_of_before_begins_anew() -> None:
    """AdamW trained the bias then, and both of a layer of one input."""
    params: dict[str, Any] = {"a": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    params |= {"z": {"kernel": jnp.ones((1, 6)), "bias": jnp.ones(6)}, "v": jnp.ones(3)}
    apart = {name: {"kernel": params[name]["kernel"]} for name in "az"}
    apart |= {"bias": {name: params[name]["bias"] for name in "az"}, "v": params["v"]}
    tx = singd_jax.singd()
    state, update = tx.init(apart), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(apart, state, apart)
    before = flat(state)
    for of in "az":  # as the names are now
        mine = [name for name in before if name.startswith(f"bias.{of}.")]
        before |= {f"{of}.bias.{name.rpartition('.')[2]}": before.pop(name) for name in mine}
    assert "z.kernel.exp_avg" in before
    fresh = tx.init(params)
    with pytest.warns(UserWarning, match=r"now: a\.kernel, z\.kernel\. They begin anew"):
        restored = singd_jax.unflatten(fresh, before)
    assert int(restored.core.step) == 3
    for kernel in ("a.kernel", "z.kernel"):
        both = (dict(own.core.layers[kernel].named_arrays()) for own in (restored, fresh))
        for (name, a), b in zip(next(both).items(), next(both).values(), strict=True):
            assert np.array_equal(a, b), name
    assert np.any(restored.core.fallback["v"].exp_avg)
    updates, _ = jax.jit(tx.update)(params, restored, params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


# ---- layers of a loss whose factors are diagonal ------------------------------------------------

_DIAGONAL = {"structures": "diagonal"}


def _network(p: Any, x: Any) -> Any:
    """A linear layer, packed projections, a scan of layers, a table that is tied, a last row."""
    h = jnp.tanh(p["table"][x["token"]] + x["data"] @ p["in"]["kernel"] + p["in"]["bias"])
    q, k = h @ p["packed"][:, :6], h @ p["packed"][:, 6:]
    h, _ = jax.lax.scan(
        lambda h, own: (jnp.tanh(h @ own["kernel"] + own["bias"]), None), q * k, p["scanned"]
    )
    logits = h @ p["table"].T
    score = h @ p["last"]["kernel"] + p["last"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]) + jnp.mean((score - 1.0) ** 2)


def _diagonal_case() -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    shapes = {
        "table": (9, 6),
        "in": {"kernel": (4, 6), "bias": (6,)},
        "packed": (6, 12),
        "scanned": {"kernel": (3, 6, 6), "bias": (3, 6)},
        "last": {"kernel": (6, 1), "bias": (1,)},
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s) / 2, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    x = {"token": rng.integers(0, 9, 32), "data": rng.standard_normal((32, 4)).astype("float32")}
    return params, jax.tree.map(jnp.asarray, x)


@pytest.mark.slow
def test_layers_with_diagonal_factors_learn_from_gradients() -> None:
    params, x = _diagonal_case()
    tx = singd_jax.singd(loss=_network, **_DIAGONAL)
    state = tx.init(params, x)
    kinds = {name: isinstance(f, Shampoo) for name, f in state.factors.items()}
    rows = {name for name, by_gradients in kinds.items() if not by_gradients}
    assert rows == {"table", "last.kernel"}
    assert len(kinds) == 6  # the packed weight is two layers
    layers = singd_jax.find_layers(_network)(params, x)
    assert layers.table("diagonal").count(rules.BY_CHOICE) == 4
    assert layers.table("dense").count(rules.BY_CHOICE) == 0

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        value, grads = singd_jax.value_and_grad(_network)(p, state, x)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    values = []
    for _ in range(60):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    assert int(state.core.skipped) == 0
    means = {n: f.inputs is not None for n, f in state.factors.items() if isinstance(f, Shampoo)}
    assert {name for name, known in means.items() if known} == {"in.kernel", "scanned.kernel"}


@pytest.mark.slow
def test_without_any_rows_the_gradients_of_jax_are_all_it_takes() -> None:
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    params = {"a": {"kernel": start()["w"], "bias": start()["b"]}}
    # names tell which axis of a weight is its outputs only if it has a bias
    params["o"] = {"kernel": start()["o"], "bias": jnp.zeros(4)}

    def loss(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
        return jnp.mean((h @ p["o"]["kernel"] + p["o"]["bias"] - x[:, :4]) ** 2)

    def trained(tx: Any, init: Any, gradients: Any) -> Any:
        p, state = params, init(tx)
        step = jax.jit(lambda p, state: tx.update(gradients(p, state), state, p))
        for _ in range(12):
            updates, state = step(p, state)
            p = optax.apply_updates(p, updates)
        return p

    of_jax = lambda p, _: jax.grad(loss)(p, x)  # noqa: E731
    with_curvature = singd_jax.value_and_grad(loss)
    expected = trained(singd_jax.singd(**_DIAGONAL), lambda tx: tx.init(params), of_jax)
    for gradients in (of_jax, lambda p, state: with_curvature(p, state, x)[1]):
        own = singd_jax.singd(loss=loss, **_DIAGONAL)
        assert_close(trained(own, lambda tx: tx.init(params, x), gradients), expected)


@pytest.mark.slow
def test_without_any_rows_wrappers_want_no_curvature() -> None:
    rng = np.random.default_rng(7)
    params = {"a": {"kernel": start()["w"], "bias": start()["b"]}}
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    loss = lambda p, x: jnp.mean((x @ p["a"]["kernel"] + p["a"]["bias"] - 1) ** 2)  # noqa: E731
    layers = singd_jax.find_layers(loss)(params, x)
    tx = singd_jax.singd(layers=layers, **_DIAGONAL)
    updates, _ = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    for wrapped in (singd_jax.MultiSteps(tx, 2, layers=layers), optax.MultiSteps(tx, 2)):
        state = wrapped.init(params)
        for half in (x[:16], x[16:]):
            given, state = wrapped.update(jax.grad(loss)(params, half), state, params)
        assert_close(given, updates)
    in_chain = optax.chain(optax.identity(), optax.MultiSteps(tx, 2).gradient_transformation())
    measured = singd_jax.value_and_curvature(loss, layers)
    assert measured(params, in_chain.init(params), x)[2] == {}
    with pytest.raises(ValueError, match=r"take the gradients of jax\.value_and_grad"):
        singd_jax.value_and_grad(loss)(params, in_chain.init(params), x)


def test_without_any_rows_layers_of_other_parameters_are_refused() -> None:
    params, x = {"a": {"kernel": start()["w"], "bias": start()["b"]}}, jnp.ones((4, 8))
    loss = lambda p, x: jnp.mean((x @ p["a"]["kernel"] + p["a"]["bias"]) ** 2)  # noqa: E731
    layers, others = (
        singd_jax.find_layers(one)(p, x)
        for one, p in ((loss, params), (lambda p, x: loss(p["q"], x), {"q": params}))
    )
    state = singd_jax.singd(layers=layers, **_DIAGONAL).init(params)
    with pytest.raises(ValueError, match="give both the same layers"):
        singd_jax.value_and_curvature(loss, others)(params, state, x)


_ROWS = {"rule": "singd"}, {"recipe": "paper"}, {"structures": ("diagonal", "dense")}


@pytest.mark.parametrize("given", _ROWS, ids=str)
def test_others_keep_their_rows(given: dict[str, Any]) -> None:
    params, x = _diagonal_case()
    state = singd_jax.singd(loss=_network, **_DIAGONAL | given).init(params, x)
    assert not any(isinstance(f, Shampoo) for f in state.factors.values())
    layers = singd_jax.find_layers(_network)(params, x)
    bare = singd_jax.scale_by_singd(layers=layers, **_DIAGONAL).init(params)
    assert not any(isinstance(f, Shampoo) for f in bare.factors.values())


def test_a_bias_in_another_order_than_its_outputs_keeps_the_rows() -> None:
    """The gradients of weight and bias tell the mean of the inputs only row by row."""
    x = jnp.asarray(np.random.default_rng(7).standard_normal((16, 4)), jnp.float32)
    params = {"w": jnp.ones((4, 2, 3)), "b": jnp.ones((3, 2)), "c": jnp.ones((2, 3))}

    def loss(p: Any, name: str, x: Any) -> Any:
        bias = p["b"].T if name == "b" else p["c"]
        return jnp.mean((jnp.einsum("ni,iab->nab", x, p["w"]) + bias - 1.0) ** 2)

    for name, by_gradients in (("b", False), ("c", True)):
        layers = singd_jax.find_layers(lambda p, x, name=name: loss(p, name, x))(params, x)
        assert layers["w"].bias is not None
        state = singd_jax.singd(layers=layers, **_DIAGONAL).init(params)
        assert isinstance(state.factors["w"], Shampoo) == by_gradients


@pytest.mark.slow
def test_it_learns_from_private_gradients() -> None:
    params = {"a": jnp.eye(6, 8) * 0.4, "b": jnp.eye(8, 3) * 0.3}
    x = jnp.sin(jnp.arange(192.0)).reshape(32, 6)
    y = 2.0 * x[:, :3]

    def loss(p: Any, x: Any, y: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

    private = optax.contrib.differentially_private_aggregate(1.0, 0.5, jax.random.key(1))
    tx = optax.chain(private, singd_jax.singd())
    state, now = tx.init(params), params

    @jax.jit
    def step(now: Any, state: Any) -> Any:
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(now, x[:, None], y[:, None])
        updates, state = tx.update(each, state, now)
        return optax.apply_updates(now, updates), state

    for _ in range(20):
        now, state = step(now, state)
    assert loss(now, x, y) < 0.9 * loss(params, x, y)


@pytest.mark.slow
def test_a_state_of_rows_begins_anew_with_gradients() -> None:
    params, x = _diagonal_case()
    layers = singd_jax.find_layers(_network)(params, x)
    # factors of rows have one more column for a bias, and averages of both sides
    old = singd_jax.singd(layers=layers, structures=("diagonal", "dense"))
    tx = singd_jax.singd(layers=layers, **_DIAGONAL)
    measured = jax.jit(singd_jax.value_and_curvature(_network, layers))
    state = old.init(params)
    _, grads, curvature = measured(params, state, x)
    _, state = jax.jit(old.update)(grads, state, params, curvature=curvature)
    saved = flat(state)
    fresh = tx.init(params)
    for name, own in fresh.factors.items():  # the same with a diagonal C
        saved = {k: a for k, a in saved.items() if not k.startswith(f"{name}.C.")}
        saved[f"{name}.C.diag"] = np.ones(own.sides[1].shape[:-1], np.float32)
    with pytest.warns(UserWarning, match="where these learn from gradients now: .* begin anew"):
        restored = singd_jax.unflatten(fresh, saved)
    for name, own in restored.factors.items():
        assert bool(jnp.all(own.averages.k == 0.0)) == isinstance(own, Shampoo), name
        has_mean = isinstance(own, Shampoo) and own.inputs is not None
        kept = np.array_equal(
            restored.core.layers[name].momenta[0], state.core.layers[name].momenta[0]
        )
        assert kept != has_mean, name
    _, grads, curvature = measured(params, restored, x)
    updates, _ = jax.jit(tx.update)(grads, restored, params, curvature=curvature)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
