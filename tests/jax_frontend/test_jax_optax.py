"""What optax, flax and orbax ask of every transformation and of its state."""

import dataclasses
import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from jax.sharding import PartitionSpec as P
from jax_cases import X
from jax_runs import LAYERS, assert_close, loss, start

import singd_jax

MAKE = {
    "normalized": functools.partial(singd_jax.singd, 0.05, layers=LAYERS),
    "paper": functools.partial(singd_jax.singd, 0.05, layers=LAYERS, recipe="paper"),
    "kfac": functools.partial(singd_jax.singd, 0.05, layers=LAYERS, kfac=True),
    "without momentum": functools.partial(singd_jax.singd, 0.05, layers=LAYERS, momentum=0.0),
    "scale_by": functools.partial(singd_jax.scale_by_singd, layers=LAYERS),
}
made = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def stepper(tx, **extra):
    @jax.jit
    def step(params, state):
        function = singd_jax.value_and_curvature(loss, LAYERS)
        value, grads, curvature = function(params, state, X)
        updates, state = tx.update(grads, state, params, curvature=curvature, **extra)
        return optax.apply_updates(params, updates), state, value

    return step


WRAPPED = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "named chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("singd", tx)),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {k: k in "av" for k in start()}),
        optax.masked(optax.set_to_zero(), {k: k not in "av" for k in start()}),
    ),
    "partition": lambda tx: optax.partition(
        {"singd": tx, "adam": optax.adam(1e-3)},
        {k: "singd" if k in "avwb" else "adam" for k in start()},
    ),
    "if finite": lambda tx: optax.apply_if_finite(tx, 5),
    "multi steps": lambda tx: optax.MultiSteps(tx, 2),
    "conditionally": lambda tx: optax.conditionally_transform(tx, lambda step: step < 1000),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


@made
@wrapped
def test_parameters_in_the_state_are_mapped(make, wrap):
    tx = wrap(make())
    state = tx.init(start())
    same = optax.tree.map_params(tx, lambda a: a, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    shapes = jax.tree.map(jnp.shape, start())

    def checked(a, shape):
        return a if isinstance(a, optax.MaskedNode) else (a.shape == tuple(shape))

    specs = {k: np.array(shape) for k, shape in shapes.items()}
    told = optax.tree.map_params(
        tx, checked, state, specs, is_leaf=lambda a: isinstance(a, optax.MaskedNode)
    )
    flags = [a for a in jax.tree.leaves(told) if isinstance(a, bool)]
    assert all(flags)


def test_parameters_in_a_state_of_an_unknown_structure_are_an_error():
    state = singd_jax.singd().init(start())
    tx = singd_jax.singd()
    with pytest.raises(ValueError, match=r"call jax\.eval_shape\(tx\.init, params\) before"):
        optax.tree.map_params(tx, lambda a: a, state)
    jax.eval_shape(tx.init, start())
    optax.tree.map_params(tx, lambda a: a, state)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [False, True])
def test_more_steps_than_an_integer_counts(rows):
    tx = singd_jax.singd(layers=LAYERS) if rows else singd_jax.singd()
    params, state, norms = start(), tx.init(start()), []
    step = stepper(tx) if rows else None
    for count in (0, 2**30 - 2, 2**31 - 2):
        state = state._replace(rest=dataclasses.replace(state.rest, step=jnp.int32(count)))
        for _ in range(3):
            if rows:
                new, state, _ = step(params, state)
            else:
                updates, state = tx.update(jax.grad(loss)(params, X), state, params)
                new = optax.apply_updates(params, updates)
            norms.append(float(optax.tree.norm(optax.tree.sub(new, params))))
        assert 0 < int(state.rest.step) < 2**30
    assert max(norms) < 20.0 * np.median(norms)


@wrapped
def test_wrapped_it_trains_and_is_compiled_once(wrap):
    tx = wrap(MAKE["normalized"]())
    step, params, state, values = stepper(tx), start(), tx.init(start()), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert step._cache_size() == 1
    assert values[-1] < 0.9 * values[0]


@made
def test_extra_arguments_of_others_are_ignored(make):
    tx = make()
    step = stepper(tx, value=1.0, other=2)
    step(start(), tx.init(start()))


@pytest.mark.parametrize("name", cases(["normalized", "paper", "scale_by"], fast=["normalized"]))
def test_injected_hyperparameters_change_nothing(name):
    plain, make = MAKE[name](), MAKE[name]
    given = dict(make.keywords) | ({"learning_rate": 0.05} if make.args else {})
    injected = optax.inject_hyperparams(make.func, static_args=("kfac",))(**given)
    state = jax.jit(injected.init)(start())
    params, state, _ = stepper(injected)(start(), state)
    own, own_state, _ = stepper(plain)(start(), plain.init(start()))
    assert_close(params, own, 1e-3)
    assert_close(state.inner_state.rest.layers, own_state.rest.layers, 1e-4)


def test_a_learning_rate_is_got_and_set():
    tx = optax.inject_hyperparams(singd_jax.singd)(0.05, layers=LAYERS)
    state = tx.init(start())
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.05)
    assert set(optax.tree.get(state, "mu")) == set(start())
    state = optax.tree.set(state, learning_rate=jnp.asarray(0.0), mu=start())
    assert_close(optax.tree.get(state, "mu"), start(), 0.0)
    params, _, _ = stepper(tx)(start(), state)
    assert_close(params["w"], start()["w"], 0.0)


# All dtypes with the default, and one with everything else.
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(
            make,
            dtype,
            id=f"{name}-{dtype}",
            marks=[] if name == "normalized" and dtype != "float32" else pytest.mark.slow,
        )
        for name, make in MAKE.items()
        for dtype in ("float16", "bfloat16", "float32")
    ],
)
def test_shapes_and_dtypes_are_kept(make, dtype):
    tx = make()
    params = jax.tree.map(lambda a: a.astype(dtype), start())
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, choice):
        function = singd_jax.value_and_curvature(loss, LAYERS)
        _, grads, curvature = function(params, state, X.astype(dtype))
        return jax.lax.cond(
            choice,
            lambda: tx.update(grads, state, params, curvature=curvature),
            lambda: (params, state),
        )

    updates, new = step(params, state, True)
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@made
def test_flax_serializes_it(make):
    tx = make()
    _, state, _ = stepper(tx)(start(), tx.init(start()))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(tx.init(start()), saved)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_close(restored, state, 0.0)


def test_flax_names_what_a_saved_state_has_not():
    state = MAKE["normalized"]().init(start())
    saved = flax.serialization.to_state_dict(state)
    del saved["rest"]["largest_lr"]
    with pytest.raises(ValueError, match="the saved State has no largest_lr"):
        flax.serialization.from_state_dict(state, saved)


def test_orbax_restores_it_without_a_template(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = MAKE["normalized"]()
    params, state, _ = stepper(tx)(start(), tx.init(start()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
        checkpointer.wait_until_finished()
        arrays = checkpointer.restore(tmp_path / "run")
    leaves, tree = jax.tree.flatten(tx.init(start()))
    assert len(jax.tree.leaves(arrays)) == len(leaves)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]
    }
    own = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in own]
    restored = tree.unflatten([by_path[name] for name in names])
    assert_close(restored, state, 0.0)
    stepper(tx)(params, restored)


@pytest.mark.slow
def test_logical_axes_of_the_parameters_are_those_of_the_state():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model = nn.Sequential([nn.Dense(8, kernel_init=init), nn.LayerNorm()])
    params = model.init(jax.random.key(0), X)["params"]

    def loss(p, x):
        return jnp.mean(model.apply({"params": p}, x) ** 2)

    layers = singd_jax.find_layers(loss)(params, X)
    assert set(layers) == {"layers_0.kernel"}
    tx = singd_jax.singd(layers=layers)
    state = jax.eval_shape(tx.init, params)
    specs, own = nn.get_partition_spec(state), nn.get_partition_spec(params)
    assert specs.mu == own
    assert own["layers_0"]["kernel"] == P("embed", "mlp")
    function = singd_jax.value_and_curvature(loss, layers)
    _, grads, curvature = function(params, tx.init(params), X)
    _, new = tx.update(grads, tx.init(params), params, curvature=curvature)
    assert nn.get_partition_spec(new).mu == own
