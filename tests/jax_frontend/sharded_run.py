"""Run by test_jax_sharding.py in a process with eight fake devices; prints JSON."""

import functools
import json
import math
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_maps import (
    few_rows_of_each_device,
    mean_over_terms,
    refusals,
    seeds_on_devices,
    shard_map_in_the_loss,
    step_in_shard_map,
    unchecked_shard_map_in_the_loss,
    unchecked_shard_map_with_constants,
    unchecked_shard_map_with_one_axis,
)
from sharded_model import (
    FSDP_TP,
    GAPS,
    PARAMS,
    SPECS,
    X,
    array,
    factors_sharded,
    gap,
    loss,
    placed,
    steps,
)

import singd_jax


def gspmd(structures):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, x = placed(mesh, P("data"), SPECS)
    return steps(loss, params, x, structures, functools.partial(factors_sharded, mesh))


def few_rows_of_divided_data(structures):
    """All are measured: the chosen ones would have to be sent. `init` has divided the factors."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, x = placed(mesh, P("data"), FSDP_TP)
    return steps(loss, params, x, structures, rows=1)


def few_rows_on_one_of_several_devices(structures):
    """The program is of one device, and measures as few as if there were no other."""
    x = array(4 * len(X), 4)
    few, full = (steps(loss, PARAMS, x, structures, rows=rows) for rows in (1, None))
    return gap(few, full)


def explicit(structures):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, x = placed(mesh, P("data"), dict.fromkeys(SPECS, P()))
        return steps(loss, params, x, structures)


def explicit_without_context(structures):
    """The types of the arrays have the mesh."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    specs = dict.fromkeys(SPECS, P()) | {"w": P(None, "data")}
    params, x = placed(mesh, P("data"), specs)
    return steps(loss, params, x, structures)


def explicit_parameters(structures):
    """Parameters and factors are sharded in the type system; products say how their results are."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def loss(p, x):
        def layer(x, w, b):
            return jnp.tanh(jnp.einsum("ni,io->no", x, w, out_sharding=P("data", None)) + b)

        x = layer(x, p["v"], p["a"])
        x, _ = jax.lax.scan(lambda x, l: (layer(x, *l), None), x, (p["w"], p["b"]))
        return jnp.mean(jnp.sum((x * p["s"] - 0.3) ** 2, axis=1))

    with jax.set_mesh(mesh):
        specs = {"v": P(None, "model"), "w": P(None, "model", "data"), "s": P("model")}
        params, x = placed(mesh, P("data"), dict.fromkeys(SPECS, P()) | specs)
        return steps(loss, params, x, structures, functools.partial(factors_sharded, mesh))


def all_reduces():
    """How many a data-parallel step needs, for the gradient and with the curvature."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x = placed(mesh, P("data"), dict.fromkeys(SPECS, P()))
    counts = []
    for T in (None, 1, 2):
        if T is None:
            lowered = jax.jit(jax.value_and_grad(loss)).lower(params, x)
        else:
            layers = singd_jax.find_layers(loss)(params, x)
            state = singd_jax.singd(layers=layers, T=T).init(params)
            function = jax.jit(singd_jax.value_and_curvature(loss, layers))
            lowered = function.lower(params, state, x)
        text = lowered.compile().as_text()
        counts.append(text.count(" all-reduce("))
    return counts


def shares(state):
    """The share of its entries that one device has of each array that is to be divided."""
    found = {}
    for path, a in jax.tree_util.tree_leaves_with_path(state.rest.layers):
        if (any(n % 8 == 0 for n in a.shape) or a.size > 1000) and a.size:
            parts = [shard.data.size for shard in a.addressable_shards]
            found[jax.tree_util.keystr(path)] = max(parts) / a.size
    return found


def state_of_parts():
    """How often a momentum is sharded otherwise than its parameter, and the shares of factors."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, x = placed(mesh, P("data"), FSDP_TP)
    layers = singd_jax.find_layers(loss)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, **GAPS)

    @jax.jit
    def step(params, state, x):
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state, wrong, found = tx.init(params), 0, []
    for _ in range(3):
        found.append(shares(state))
        for name, own in state.core.layers.items():
            for leaf, m in zip(layers[name].leaves, own.momenta, strict=True):
                wrong += m.shape != PARAMS[leaf].shape
                wrong += not m.sharding.is_equivalent_to(params[leaf].sharding, m.ndim)
        params, state = step(params, state, x)
    return {"momenta": wrong, "shares": found}


def sides_of_a_bias(structures):
    """K has the side d_in + 1, which 8 devices do not divide; a state goes on elsewhere."""
    params = {"w": array(64, 16) / 4, "b": array(16), "s": array(16)}
    x = array(16, 64)

    def loss(p, x):
        return jnp.mean(((jnp.tanh(x @ p["w"] + p["b"]) * p["s"]) - 0.3) ** 2)

    layers = singd_jax.find_layers(loss)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, structures=structures, **GAPS)

    def begun(*lengths, kind=AxisType.Auto):
        """Parameters, data and a compiled step on so many devices."""
        names = ("data", "model")[: len(lengths)]
        size = math.prod(lengths)
        mesh = jax.make_mesh(
            lengths, names, axis_types=(kind,) * len(names), devices=jax.devices()[:size]
        )
        specs = {"w": P(*names), "b": P(), "s": P()}
        own = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
        like = jax.tree.map(lambda a: a.sharding, (own, tx.init(own)))

        @functools.partial(jax.jit, out_shardings=like)
        def step(params, state, x):
            _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, x)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state

        return own, tx.init(own), step

    def steps(n, params, state, step):
        for _ in range(n):
            params, state = step(params, state, x)
        return params, state

    def end(params, state):
        return jax.tree.map(np.asarray, (params, singd_jax.flatten(state)))

    single = jax.jit(begun(1)[2])
    expected = end(*steps(4, params, tx.init(params), single))
    own, state, step = begun(4, 2)
    half = steps(2, own, state, step)
    flat = {name: np.asarray(a) for name, a in singd_jax.flatten(half[1]).items()}
    restored = singd_jax.unflatten(state, flat)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    moved = sum(not a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)
    again = steps(2, *half, step)
    told = {
        "shares": [*map(shares, (state, again[1]))],
        "compiled": step._cache_size(),
        "moved": moved,
    }
    told["same"] = gap(end(*again), expected)

    for name, other in (("fewer", begun(2, 2)), ("one", (params, tx.init(params), single))):
        saved = flax.serialization.to_bytes(half)
        back = flax.serialization.from_bytes(other[:2], saved)
        told[name] = gap(end(*steps(2, *back, other[2])), expected)
    half = steps(2, params, tx.init(params), single)
    back = flax.serialization.from_bytes((own, state), flax.serialization.to_bytes(half))
    told["of one"] = gap(end(*steps(2, *back, jax.jit(step.__wrapped__))), expected)
    return told


RUNS = (
    gspmd,
    few_rows_of_divided_data,
    explicit,
    explicit_without_context,
    explicit_parameters,
    shard_map_in_the_loss,
    unchecked_shard_map_in_the_loss,
    unchecked_shard_map_with_constants,
    unchecked_shard_map_with_one_axis,
    mean_over_terms,
    step_in_shard_map,
)


def main():
    assert len(jax.devices()) == 8
    found = {}
    structures, *names = sys.argv[1:]
    expected = steps(loss, PARAMS, X, structures)
    for run in RUNS:
        if not names or run.__name__ in names:
            found[run.__name__] = gap(run(structures), expected)
    found["refusals"] = refusals()
    found["seeds"] = seeds_on_devices(structures)
    found["all-reduces"] = all_reduces()
    found["state"] = state_of_parts()
    if structures == "dense":
        found["sides of a bias"] = sides_of_a_bias(structures)
    if structures != "diagonal":  # which learns from gradients
        found["few rows"] = few_rows_of_each_device(structures)
        found["few rows on one of several"] = few_rows_on_one_of_several_devices(structures)
    print(json.dumps(found))


main()
