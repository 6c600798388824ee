"""Steps with `jax.shard_map`, in the loss or around the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_model import BATCH, GAPS, PARAMS, SPECS, X, array, gap, loss, model, placed, steps

import singd_jax


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
    for wrong in (unchecked, loss_that_gathers(False), loss_that_gathers(True)):
        try:
            singd_jax.find_layers(wrong)(PARAMS, X)
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


def seeds_on_devices(structures):
    """Trainings of eight seeds, from `init` on, each on a device: the largest gaps to `vmap`."""
    mesh = jax.make_mesh((8,), ("seeds",), axis_types=(AxisType.Auto,))
    layers = singd_jax.find_layers(loss)(PARAMS, X)
    given = {"structures": structures, "rows": None} | GAPS
    keys, gaps = jax.random.split(jax.random.key(0), 8), {}

    def train(tx, both, key):
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), PARAMS)
        x = X + jax.random.normal(key, X.shape)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(both(params, state, x)[1], state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0][0]

    def plain(params, state, x):
        return jax.value_and_grad(loss)(params, x)

    with_rows = singd_jax.singd(0.05, layers=layers, **given), singd_jax.value_and_grad(loss)
    for name, both in (
        ("rows", with_rows),
        ("no rows", (singd_jax.singd(0.05, **given), plain)),
    ):
        one = functools.partial(train, *both)
        expected = jax.jit(jax.vmap(one))(keys)

        def alone(key, one=one):
            return jax.tree.map(lambda p: p[None], one(key[0]))

        gaps[f"{name}, pmap"] = gap(jax.pmap(one)(keys), expected)
        for check in (True, False):
            specs = {"in_specs": P("seeds"), "out_specs": P("seeds"), "check_vma": check}
            found = jax.jit(jax.shard_map(alone, mesh=mesh, **specs))(keys)
            gaps[f"{name}, check_vma={check}"] = gap(found, expected)
    return gaps
