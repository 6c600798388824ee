"""How many kernels XLA makes of a step: fusions, products and what it runs by itself."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import singd_jax

# What is no work: names of values, and control flow, whose computations are counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("conditional", "while", "call", "iota"),
}

# Of 17 weights, which step one by one: to stack equal ones takes fewer kernels (563 and 723), but
# copies of all gradients, and twice the time to compile. XLA for a CPU fuses less than for a GPU.
# 24 of them make what a weight takes of the rate (5.8b, 5.12b), known in the program alone. A
# refresh takes the traces of U and G, two kernels for each, which every gradient took before. Three
# for each weight make how much gradients agree over noise, and what follows for steps (5.12).
OTHER, REFRESH, ADAMW = 1087, 1628, 111


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of an optimized module."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found["ENTRY" if line.startswith("ENTRY") else start[1]] = []
        elif " = " in line:
            lines.append(line.strip())
    return found


def kernels(text: str, taken: int) -> int:
    """The instructions that work, where conditionals take the branch of this index."""
    all_of = computations(text)

    def count(name: str) -> int:
        total = 0
        for line in all_of[name]:
            operation = re.search(r" = (?:\([^=]*?\)|\S+) ([\w\-]+)\(", line)
            assert operation is not None, line
            kind = operation[1]
            total += kind not in FREE
            if kind == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                assert branches is not None, line
                total += count(branches[1].replace("%", "").split(", ")[taken])
            elif kind in ("call", "while"):
                for called in re.findall(r"(?:to_apply|body)=%?([\w.\-]+)", line):
                    total += count(called)
        return total

    return count("ENTRY")


def gpt(d: int = 16, blocks: int = 4, symbols: int = 13):
    """The parameters and the loss of a transformer of equal blocks, as the one of torch's test."""
    rng = np.random.default_rng(0)
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}

    def dense(shape):
        w = rng.standard_normal(shape) / shape[0] ** 0.5
        return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(shape[1])}

    params = {
        "symbols": jnp.asarray(rng.standard_normal((symbols, d)), jnp.float32),
        "blocks": [{name: dense(shape) for name, shape in shapes.items()} for _ in range(blocks)],
        "scale": jnp.ones(d),
        "head": dense((d, symbols)),
    }

    def loss(p, ids):
        x = p["symbols"][ids]
        for block in p["blocks"]:
            apply = lambda name, x, block=block: x @ block[name]["w"] + block[name]["b"]  # noqa: E731
            q, k, v = jnp.split(apply("qkv", x), 3, axis=-1)
            x = x + apply("out", jax.nn.softmax(q @ k.mT) @ v)
            x = x + apply("down", jax.nn.gelu(apply("up", x)))
        logits = (x * p["scale"]) @ p["head"]["w"] + p["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    return params, loss, jnp.asarray(rng.integers(symbols, size=(2, 8)))


def compiled(update, *given) -> str:
    """The module of an update that may write to the state and to the gradients."""
    return jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile().as_text()


@pytest.mark.slow
def test_xla_makes_few_kernels_of_a_step():
    params, loss, ids = gpt()
    layers = singd_jax.find_layers(loss)(params, ids)
    tx = singd_jax.singd(layers=layers, T=10, growing_T=False)
    state = tx.init(params)
    function = singd_jax.value_and_curvature(loss, layers)
    _, grads, curvature = jax.eval_shape(function, params, state, ids)

    def update(grads, state, params, curvature):
        return tx.update(grads, state, params, curvature=curvature)

    text = compiled(update, grads, state, params, curvature)
    other, refresh = kernels(text, 0), kernels(text, 1)
    adamw = optax.adamw(1e-3)
    text = compiled(adamw.update, grads, adamw.init(params), params)
    assert kernels(text, 0) == ADAMW
    assert other <= OTHER
    assert refresh <= REFRESH


def conditions(module: str) -> int:
    """How many conditions stay when those on constants are decided, as XLA does."""
    constants, left = set(), 0
    for line in module.splitlines():
        if "func.func" in line:
            constants = set()
        if made := re.match(r"\s*(%\w+) = stablehlo.constant", line):
            constants.add(made[1])
        if case := re.match(r'\s*(%\w+)(?::\d+)? = "stablehlo.case"\((%\w+)\)', line):
            left += case[2] not in constants
            constants |= {case[1]} if case[2] in constants else set()  # the index of a platform
    return left


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_a_gpu_waits_for_no_condition_of_a_layer(platform):
    """The host reads each of them; the one that is left is of the refresh."""
    params, loss, x = two_layers(8, 16)
    tx = singd_jax.singd(T=10)  # from gradients, which needs no rows
    state, grads = tx.init(params), jax.eval_shape(jax.grad(loss), params, x)
    module = jax.export.export(jax.jit(tx.update), platforms=[platform])(grads, state, params)
    left = conditions(module.mlir_module())
    assert left == (1 if platform == "cuda" else 2)  # the layers share code, and its condition


def two_layers(d, rows):
    """The parameters and the loss of two layers with biases, their sides a multiple of a block."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = [{"w": jax.random.normal(key, (d, d)) / d**0.5, "b": jnp.ones(d)} for key in keys[:2]]

    def loss(params, x):
        for p in params:
            x = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.mean(x**2)

    return params, loss, jax.random.normal(keys[2], (rows, d))


@pytest.mark.slow
def test_each_factor_costs_a_gradient_two_kernels():
    """Choosing the rows, and the product of them."""
    params, loss, x = two_layers(128, 1024)
    layers = singd_jax.find_layers(loss)(params, x)
    state = singd_jax.singd(layers=layers, T=1).init(params)
    both = jax.jit(singd_jax.value_and_curvature(loss, layers)).lower(params, state, x).compile()
    alone = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    constants = len(re.findall(r" copy\(%?constant", both.as_text()))
    more = kernels(both.as_text(), 0) - constants - kernels(alone.as_text(), 0)
    assert more <= 2 * 2 * 2


@pytest.mark.slow
def test_a_condition_around_the_curvature_copies_none_of_it():
    """What its branches return is the result: scaled behind it, it was there twice."""
    params, loss, x = two_layers(64, 128)
    layers = singd_jax.find_layers(loss)(params, x)
    function, temporary = singd_jax.value_and_curvature(loss, layers), []
    for T in (1, 50):
        state = singd_jax.singd(layers=layers, T=T).init(params)
        lowered = jax.jit(function).lower(params, state, x)
        assert ("stablehlo.case" in lowered.as_text()) == (T == 50)
        temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert temporary[1] <= 1.01 * temporary[0]


def agent(d, rows):
    """The parameters and the loss of an actor and a critic of two hidden layers of d units."""
    keys = iter(jax.random.split(jax.random.key(0), 7))

    def net(*sizes):
        return [
            {"w": jax.random.normal(next(keys), shape) / 8, "b": jnp.ones(shape[1])}
            for shape in itertools.pairwise(sizes)
        ]

    def apply(params, x):
        *hidden, last = params
        for p in hidden:
            x = jnp.tanh(x @ p["w"] + p["b"])
        return x @ last["w"] + last["b"]

    def loss(params, x):
        odds, value = (jnp.mean(apply(p, x) ** 2) for p in params)
        return odds + value

    params = [net(24, d, d, 6), net(24, d, d, 1)]
    return params, loss, jax.random.normal(next(keys), (rows, 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structures", "d", "rows"),
    [(None, 64, 128), (None, 256, 256), ("dense", 256, 512), ("diagonal", 256, 512)],
)
def test_rows_are_measured_where_they_are(structures, d, rows):
    """A column of ones for the bias, or a choice of half the rows, would be a copy of them.

    The copies for factors of several blocks (None, 256, 256) are made before the gradient goes on.
    """
    params, loss, x = agent(d, rows)
    layers = singd_jax.find_layers(loss, structures=structures)(params, x)
    state = singd_jax.singd(layers=layers, T=50).init(params)
    both = jax.jit(singd_jax.value_and_curvature(loss, layers)).lower(params, state, x)
    alone = jax.jit(jax.value_and_grad(loss)).lower(params, x)
    temporary, of_gradient = (
        lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (both, alone)
    )
    assert temporary <= 1.01 * of_gradient
