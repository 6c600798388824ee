"""Run by test_jax_sharding.py in a process with eight fake devices; prints JSON."""

import dataclasses
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

import singd_jax


def array(*shape):
    rng = np.random.default_rng(list(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32) * 0.5


PARAMS = {"v": array(4, 8), "a": array(8), "w": array(2, 8, 8), "b": array(2, 8), "s": array(8)}
X, BATCH = array(16, 4), 16
GAPS = {"T": 2, "growing_T": False}
SPECS = {"v": P(None, "model"), "a": P("model"), "w": P(None, "model"), "b": P(), "s": P()}
FSDP_TP = {
    "v": P("data", "model"),
    "a": P("model"),
    "w": P(None, "data", "model"),
    "b": P(None, "model"),
    "s": P("data"),
}


def model(p, x):
    x = jnp.tanh(x @ p["v"] + p["a"])
    x, _ = jax.lax.scan(lambda x, l: (jnp.tanh(x @ l[0] + l[1]), None), x, (p["w"], p["b"]))
    return jnp.sum((x * p["s"] - 0.3) ** 2, axis=1)


def loss(p, x):
    return jnp.mean(model(p, x))


def steps(
    loss, params, x, structures, place=lambda state: state, wrap=lambda f: f, rows=None, **options
):
    """The parameters after three steps, as NumPy."""
    layers = singd_jax.find_layers(loss, **options)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, structures=structures, rows=rows, **GAPS)

    def step(params, state, x):
        _, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    step = jax.jit(wrap(step))
    state = place(tx.init(params))
    for _ in range(3):
        params, state = step(params, state, x)
    assert int(state.core.skipped) == 0
    return jax.tree.map(np.asarray, params)


def gap(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) for a, b in pairs)


def placed(mesh, x_spec, specs):
    params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in PARAMS.items()}
    return params, jax.device_put(X, NamedSharding(mesh, x_spec))


def factors_sharded(mesh, state):
    """Every factor whose last axis the mesh divides is sharded along it."""

    def place(leaf):
        spec = P(*[None] * (leaf.ndim - 1), "model") if leaf.ndim and leaf.shape[-1] == 8 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def gspmd(structures):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, x = placed(mesh, P("data"), SPECS)
    return steps(loss, params, x, structures, functools.partial(factors_sharded, mesh))


def few_rows_of_divided_data(structures):
    """All are measured: the chosen ones would have to be sent. `init` has divided the factors."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, x = placed(mesh, P("data"), FSDP_TP)
    return steps(loss, params, x, structures, rows=1)


def explicit(structures):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, x = placed(mesh, P("data"), dict.fromkeys(SPECS, P()))
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


def loss_in_shard_map(axes, x_spec, check_vma):
    mesh = jax.make_mesh(axes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), x_spec), out_specs=P(), check_vma=check_vma
    )
    def sharded(p, x):
        mean = jax.lax.pmean(jnp.mean(model(p, x)), "data")
        return mean if check_vma else jax.lax.pmean(mean, "model")

    return sharded


def shard_map_in_the_loss(structures):
    return steps(loss_in_shard_map((4, 2), P("data"), True), PARAMS, X, structures)


def unchecked_shard_map_in_the_loss(structures):
    """Without replicas: both axes divide the batch."""
    return steps(loss_in_shard_map((4, 2), P(("data", "model")), False), PARAMS, X, structures)


def unchecked_shard_map_with_constants(structures):
    """What is no data may be the same everywhere: an array of the closure, a key."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    ones, key = jnp.ones(4), jax.random.PRNGKey(0)
    specs = (P(), P(("data", "model")), P())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    def sharded(p, x, key):
        kept = jax.random.bernoulli(key, 1.0, x.shape)
        return jax.lax.pmean(jnp.mean(model(p, x * ones * kept)), ("data", "model"))

    return steps(lambda p, x: sharded(p, x, key), PARAMS, X, structures)


def unchecked_shard_map_with_one_axis(structures):
    return steps(loss_in_shard_map((8, 1), P("data"), False), PARAMS, X, structures)


def mean_over_terms(structures):
    """Without positions a mean over the batch, which both kinds of shard_map divide."""
    checked = loss_in_shard_map((4, 2), P("data"), True)
    unchecked = loss_in_shard_map((4, 2), P(("data", "model")), False)
    given = {"loss_average": "batch+sequence"}
    a, b = (steps(loss, PARAMS, X, structures, **given) for loss in (checked, unchecked))
    assert gap(a, b) < 1e-5
    return a


def loss_that_gathers(check_vma):
    """Every device along "model" multiplies the same data."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (P(), P(("data", "model")))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    def sharded(p, x):
        body = jax.checkpoint(lambda x, _: (jax.lax.all_gather(x, "model")[0], None))
        x, _ = jax.lax.scan(body, x, None, length=1)
        return jax.lax.pmean(jnp.mean(model(p, x)), ("data", "model"))

    return sharded


def refusals():
    """What is said where devices share what a parameter multiplies."""
    unchecked = loss_in_shard_map((4, 2), P("data"), False)
    said = []
    for loss in (unchecked, loss_that_gathers(False), loss_that_gathers(True)):
        try:
            singd_jax.find_layers(loss)(PARAMS, X)
        except ValueError as error:
            said.append(str(error))
    return said


def step_in_shard_map(structures):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    wrap = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
    )

    def local(p, x):
        return jax.lax.pmean(jnp.mean(model(p, x)), "data")

    found = singd_jax.find_layers(loss)(PARAMS, X)  # the same layers, outside
    layers = singd_jax.find_layers(loss, batch_size=BATCH)(PARAMS, X)
    assert set(found) == set(layers)
    tx = singd_jax.singd(0.05, layers=layers, structures=structures, **GAPS)

    def step(params, state, x):
        _, grads, curvature = singd_jax.value_and_curvature(local, layers)(params, state, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    step = jax.jit(wrap(step))
    params, x = placed(mesh, P("data"), dict.fromkeys(SPECS, P()))
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, x)
    return jax.tree.map(np.asarray, params)


def few_rows_of_each_device(structures):
    """The mean over steps against all rows, and how many all-reduces both need."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, _ = placed(mesh, P("data"), dict.fromkeys(SPECS, P()))
    rows = array(4 * BATCH, 4)  # of few rows a diagonal factor reads all
    x = jax.device_put(rows, NamedSharding(mesh, P("data")))
    layers = singd_jax.find_layers(loss, batch_size=len(rows))(PARAMS, rows)
    found, counts = [], []
    for most in (None, 1):
        tx = singd_jax.singd(layers=layers, structures=structures, rows=most, T=1)

        def curvature(params, state, x):
            def local(p, x):
                return jax.lax.pmean(jnp.mean(model(p, x)), "data")

            return singd_jax.value_and_curvature(local, layers)(params, state, x)[2]

        state = tx.init(params)
        inside = jax.shard_map(curvature, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
        function = jax.jit(inside).lower(params, state, x).compile()
        counts.append(function.as_text().count(" all-reduce("))
        each = []
        for step in range(64):
            core = dataclasses.replace(state.core, step=jnp.asarray(step, jnp.int32))
            c = function(params, state.with_core(core), x)
            each.append(jax.tree.map(np.asarray, c))
        found.append(jax.tree.map(lambda *a: np.stack(a), *each))
    full, some = found
    mean = jax.tree.map(lambda a: a.mean(0), (full, some))
    spread = max(
        float((a.std(0) / a.mean(0)).max()) for a in jax.tree.leaves([c.t_U for c in some.values()])
    )
    return {"gap": gap(mean[1], mean[0]), "spread": spread, "all-reduces": counts}


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
    again = steps(2, *half, step)
    told = {"shares": [*map(shares, (state, again[1]))], "compiled": step._cache_size()}
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
    found["all-reduces"] = all_reduces()
    found["state"] = state_of_parts()
    if structures == "dense":
        found["sides of a bias"] = sides_of_a_bias(structures)
    found["few rows"] = few_rows_of_each_device(structures)
    print(json.dumps(found))


main()
