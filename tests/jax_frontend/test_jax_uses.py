"""Which uses of a weight are layers, and what the table says of the others."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_cases import X, array, mean_square

import singd_jax


def chunk(w, i):
    return lax.dynamic_slice_in_dim(w, 3 * i, 3, axis=1)


def head_in_slices(p, x):
    return sum(mean_square(x @ chunk(p["w"], i)) for i in range(2))


def test_chunks_of_a_head_that_start_at_numbers_are_layers():
    params = {"w": array(4, 6)}
    layers = singd_jax.find_layers(head_in_slices)(params, X)
    assert set(layers) == {"w[:,0:3]", "w[:,3:6]"}
    assert max(singd_jax.check(head_in_slices, layers)(params, X).values()) < 1e-5


@jax.custom_vjp
def clipped(x, w):
    return x @ w


clipped.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (g @ kept[1].T, jnp.clip(kept[0].T @ g, -0.01, 0.01)),
)


def head_in_loop(p, x):
    def add(total, i):
        return total + mean_square(x @ chunk(p["w"], i)), None

    return lax.scan(add, 0.0, jnp.arange(2))[0]


def head_in_scanned_chunks(p, x):
    chunks = jnp.moveaxis(p["w"].reshape(4, 2, 3), 1, 0)
    return lax.scan(lambda total, w: (total + mean_square(x @ w), None), 0.0, chunks)[0]


@pytest.mark.parametrize(
    ("loss", "said", "remedy"),
    [
        (
            lambda p, x: mean_square(clipped(x, p["w"])),
            "inside a custom_vjp, .* by `min`: make it .*, or multiply by it outside",
            lambda p, x: mean_square(x @ p["w"]),
        ),
        (
            head_in_loop,
            "known only at run time: reshape its axis to .* and scan over the chunks",
            head_in_scanned_chunks,
        ),
    ],
    ids=["custom_vjp", "slices"],
)
def test_the_table_says_why_there_are_no_rows_and_what_to_do(loss, said, remedy):
    params = {"w": array(4, 6)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert re.search(f"no rows.*{said}", str(layers))
    trained = singd_jax.singd(layers=layers).init(params).layers["w"]
    assert trained.kind == "no rows"
    np.testing.assert_allclose(remedy(params, X), loss(params, X), rtol=1e-6)
    assert set(singd_jax.find_layers(remedy)(params, X)) == {"w"}


@jax.custom_vjp
def scaled(x, s):
    return x * s


scaled.defvjp(
    lambda x, s: (x * s, (x, s)),
    lambda kept, g: (g * kept[1], jnp.einsum("nd,nd->d", kept[0], g)),
)


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        (lambda x, s: x * s, (4,)),
        (lambda x, s: jnp.einsum("nd,d->nd", x, s), (4,)),
        (lambda x, s: jnp.einsum("nhd,hd->nhd", x.reshape(-1, 2, 2), s).reshape(x.shape), (2, 2)),
        (lambda x, s: jax.vmap(jnp.multiply, (1, 0), 1)(x, s), (4,)),
        (scaled, (4,)),
        (lambda x, s: lax.scan(lambda x, s: (jnp.einsum("nd,d->nd", x, s), None), x, s)[0], (3, 4)),
    ],
)
def test_a_scale_is_no_stack_of_matrices(scale, shape):
    def loss(p, x):
        return mean_square(jnp.tanh(scale(x, p["s"])) @ p["w"])

    params = {"s": array(*shape), "w": array(4, 3)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert set(layers) == {"w"}
    assert layers.others["s"].endswith("multiplied entry by entry")
    assert singd_jax.check(loss, layers)(params, X)["w"] < 1e-5


def test_a_target_of_the_weight_itself_is_no_further_use():
    def loss(p, x):
        target = jnp.tanh(x @ lax.stop_gradient(p["w"]))
        return jnp.mean((x @ p["w"] - target) ** 2) + lax.stop_gradient(p["t"]).sum()

    params = {"w": array(4, 3), "t": array(3)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert layers["w"].elsewhere == ()
    assert layers.others == {"t": "no gradient of the loss reaches it"}
    assert max(singd_jax.check(loss, layers)(params, X).values()) < 1e-5


def with_a_target(p, x, z):
    return x @ p["w"] + p["b"], z @ p["w"]


with_a_rule = jax.custom_jvp(with_a_target)
with_a_rule.defjvp(lambda given, tangents: jax.jvp(with_a_target, given, tangents))


def in_a_branch(p, x, z):
    return lax.cond(x[0, 0] < 9.0, with_a_target, with_a_target, p, x, z)


def by_examples(p, x, z):
    return lax.scan(lambda _, xz: (None, with_a_target(p, *xz)), None, (x, z))[1]


def carried(p, x, z):
    def step(carry, xz):
        y, target = with_a_target(p, *xz)
        return (carry[0] + y, carry[1] + target), None

    zeros = jnp.zeros(3)
    total, target = lax.scan(step, (zeros, zeros), (x, z))[0]
    return total[None], target[None]


def carried_unrolled(p, x, z):
    y, target = with_a_target(p, x, z)
    return y.sum(0)[None], target.sum(0)[None]


def on_each_device(p, x, z):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P("data"), P("data"))}
    return jax.shard_map(with_a_target, mesh=mesh, **specs)(p, x, z)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        (jax.jit(with_a_target), with_a_target),
        (jax.checkpoint(with_a_target), with_a_target),
        (jax.jit(jax.checkpoint(jax.jit(with_a_target))), with_a_target),
        (with_a_rule, with_a_target),
        (in_a_branch, with_a_target),
        (by_examples, with_a_target),
        (carried, carried_unrolled),
        (on_each_device, with_a_target),
    ],
)
@pytest.mark.parametrize("compare", [lambda f: f, jax.jit, jax.checkpoint])
def test_targets_are_no_use_wherever_they_are_computed(wrapped, plain, compare):
    difference = compare(lambda y, target: mean_square(y - lax.stop_gradient(target)))

    def loss(network, p, x, z):
        return difference(*network(p, x, z))

    params, batch, found = {"w": array(4, 3), "b": array(3)}, (X, array(*X.shape, seed=1)), []
    for network in (wrapped, plain):
        of = functools.partial(loss, network)
        layers = singd_jax.find_layers(of, loss_average=7)(params, *batch)
        state = singd_jax.singd(layers=layers, kfac=True).init(params)
        measured = jax.jit(singd_jax.value_and_curvature(of, layers))
        found.append((str(layers), measured(params, state, *batch)))
    assert found[0][0] == found[1][0]
    for a, b in zip(*(jax.tree.leaves(of) for _, of in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_call_with_a_target_is_no_twin_of_one_that_is_trained_whole():
    block = jax.checkpoint(lambda w, x: (x @ w, jnp.tanh(x) @ w))

    def loss(p, x):
        y, target = block(p["v"], x)
        return mean_square(y - lax.stop_gradient(target)) + mean_square(sum(block(p["w"], x)))

    params = {"v": array(4, 3), "w": array(4, 3, seed=1)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert [layers[name].uses for name in "vw"] == [1, 2]
    assert max(singd_jax.check(loss, layers)(params, X).values()) < 1e-5


def test_the_gradient_that_makes_an_adversarial_input_is_no_use():
    def plain(p, x):
        return mean_square(jnp.tanh(x @ p["w"]) @ p["v"])

    def moved(p, x):
        return x + 0.1 * jnp.sign(jax.grad(plain, 1)(p, x))

    def loss(p, x):
        return plain(p, moved(p, x))

    params = {"w": array(4, 3), "v": array(3, 2)}
    found = []
    for function, data in ((loss, X), (plain, moved(params, X))):
        layers = singd_jax.find_layers(function)(params, data)
        state = singd_jax.singd(layers=layers).init(params)
        found.append(singd_jax.value_and_curvature(function, layers)(params, state, data))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def added_to_the_transposed_use(p, x):
    return mean_square(jnp.tanh(x @ p["w"] + p["a"]) @ p["w"].T + p["a"])


def added_to_the_transposed_use_of_another(p, x):
    return mean_square(jnp.tanh((x @ p["v"] + p["b"]) @ p["w"]) @ p["w"].T + p["b"])


def added_to_some_uses_of_another(p, x):
    x = jnp.tanh((x @ p["v"] + p["a"]) @ p["v"] + p["b"])
    return mean_square(x @ p["w"] + p["b"])


@pytest.mark.parametrize(
    ("loss", "bias"),
    [
        (added_to_the_transposed_use, "a"),
        (added_to_the_transposed_use_of_another, "b"),
        (added_to_some_uses_of_another, "b"),
    ],
)
def test_a_bias_that_other_matrices_have_too_is_the_bias_of_none(loss, bias):
    params = {"v": array(4, 4, seed=1), "w": array(4, 4), "a": array(4), "b": array(4, seed=1)}
    layers = singd_jax.find_layers(loss)(params, X)
    assert "w" in layers
    assert layers.others[bias] == "the bias of several matrices"
    assert max(singd_jax.check(loss, layers)(params, X).values()) < 1e-5


def test_the_bias_of_a_transposed_use_alone_is_said_to_be_one():
    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"])

    layers = singd_jax.find_layers(loss)({"w": array(4, 4), "b": array(4)}, X)
    assert layers.others["b"] == "the bias of w where it is transposed"
