"""SINGD among the transformations of optax, and under those of jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_all_cases import CASES
from jax_cases import X
from jax_runs import LAYERS, assert_close, loss, run, start, stepper

import singd_jax
from singd_core.optimizer import Fallback


def test_the_table_tells_who_owns_each_parameter():
    assert str(LAYERS).splitlines() == [
        "parameter  shape  kind   matrix  K      C      bytes of factors",
        "v + a      4×5    dense  5×5     dense  dense               200",
        "w + b      5×3    dense  3×6     dense  dense               180",
        f"scale      5      AdamW{'':42}multiplied entry by entry",
    ]
    assert "diagonal" in LAYERS.table("diagonal")
    found = singd_jax.singd(layers=LAYERS, recipe="paper").init(start()).core.layers
    kept = {
        name: sum(a.nbytes for n, a in own.factors.named_arrays() if n[:2] in ("K.", "C.", "m_"))
        for name, own in found.items()
    }
    rows = [row.split() for row in LAYERS.table(recipe="paper").splitlines()[1:]]
    assert {row[0]: int(row[-1]) for row in rows[:2]} == kept == {"v": 400, "w": 360}


def test_parameters_of_no_layer_follow_optax_adamw():
    fallback = Fallback(lr=0.01, weight_decay=0.1)
    params, state = run(singd_jax.singd(0.0, layers=LAYERS, warmup=0, fallback=fallback))
    # with a rate of 0 only `scale` moves, so optax sees the same gradients
    adamw = optax.adamw(0.01, weight_decay=0.1)
    expected = start()
    adam_state = adamw.init(expected["scale"])
    for _ in range(4):
        g = jax.grad(lambda s: loss(expected | {"scale": s}, X))(expected["scale"])
        u, adam_state = adamw.update(g, adam_state, expected["scale"])
        expected["scale"] = expected["scale"] + u
    assert_close(params, expected)
    assert set(state.core.fallback) == {"scale"}


def test_between_refreshes_the_factors_stay_and_the_curvature_is_zeros():
    tx = singd_jax.singd(0.02, layers=LAYERS, T=3, recipe="paper")
    state, params = tx.init(start()), start()
    vac = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))
    update = jax.jit(tx.update)
    for i in range(5):
        _, grads, curvature = vac(params, state, X)
        updates, new = update(grads, state, params, curvature=curvature)
        moved = not np.array_equal(
            new.core.layers["w"].factors.K.dense(), state.core.layers["w"].factors.K.dense()
        )
        assert moved == (i % 3 == 0) == bool(np.any(curvature["w"].H_K.dense() != 0.0))
        params, state = optax.apply_updates(params, updates), new
    assert int(state.core.step) == 5
    assert int(state.core.layers["w"].factors.averages.k) == 2


def test_a_step_is_compiled_once():
    tx = singd_jax.singd(0.02, layers=LAYERS)
    step = stepper(tx)
    run(tx, 3, step=step)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_step_keeps_nothing_of_its_inner_traces():
    """`jax_check_tracer_leaks` looks for it."""
    with jax.checking_leaks():
        for T in (1, 2):
            run(singd_jax.singd(layers=LAYERS, T=T, structures="diagonal"), steps=1)
            tx = singd_jax.singd(T=T)
            params, grads = start(), jax.grad(loss)(start(), X)
            jax.jit(tx.update)(grads, tx.init(params), params)


def test_without_curvature_the_factors_stay():
    tx = singd_jax.singd(0.02, layers=LAYERS, T=1)
    params = start()
    state = tx.init(params)
    grads = jax.grad(loss)(params, X)
    for update in (tx.update, singd_jax.scale_by_singd(layers=LAYERS).update):
        with pytest.raises(ValueError, match=r"got no curvature: .*value_and_grad.*curvature=None"):
            update(grads, state, params)
    updates, new = jax.jit(functools.partial(tx.update, curvature=None))(grads, state, params)
    assert_close(new.core.layers["v"].factors, state.core.layers["v"].factors, 0.0)
    assert float(jnp.abs(updates["v"]).max()) > 0.0
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, state, curvature=None)


@pytest.mark.parametrize("where", ["gradient", "curvature"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where):
    tx = singd_jax.singd(0.02, layers=LAYERS, T=1)
    params, state = run(tx, steps=2)
    _, grads, curvature = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))(params, state, X)
    if where == "gradient":
        grads["scale"] = grads["scale"].at[0].set(jnp.nan)
    else:
        curvature["v"] = jax.tree.map(lambda a: a * jnp.inf, curvature["v"])
    with jax.transfer_guard_device_to_host("disallow"):  # and the host does not wait to know
        updates, new = jax.jit(tx.update)(grads, state, params, curvature=curvature)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert_close(new.core.layers, state.core.layers, 0.0)
    assert_close(new.core.fallback, state.core.fallback, 0.0)
    assert (int(new.core.skipped), int(new.core.step)) == (1, 3)


def test_the_bare_preconditioner_takes_settings_of_the_factors_alone():
    tx = optax.inject_hyperparams(singd_jax.scale_by_singd)(layers=LAYERS, damping=0.2, T=1)
    plain = singd_jax.scale_by_singd(layers=LAYERS, damping=0.2, T=1)
    # an array for the damping is rounded elsewhere than a constant, and steps of rate 1 are long
    assert_close(run(tx)[0], run(plain)[0], 1e-5)
    with pytest.raises(TypeError, match="momentum"):
        singd_jax.scale_by_singd(layers=LAYERS, momentum=0.9)
    with pytest.raises(ValueError, match=r"T=1\.5: must be an integer"):
        singd_jax.singd(0.02, layers=LAYERS, T=1.5)


def test_the_bare_preconditioner_keeps_its_factors_where_a_step_is_not_finite():
    tx, params = singd_jax.scale_by_singd(layers=LAYERS, T=1), start()
    state = tx.init(params)
    _, grads, curvature = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))(params, state, X)
    grads["w"] = grads["w"].at[0, 0].set(jnp.nan)
    updates, new = jax.jit(tx.update)(grads, state, params, curvature=curvature)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert_close(new.factors, state.factors, 0.0)
    assert int(new.core.skipped) == 1


def test_kfac_leaves_tables_of_embeddings_to_adamw():
    case = CASES["embedding"]()
    layers = singd_jax.find_layers(case.loss)(case.params, *case.batch)
    tx = singd_jax.singd(0.02, layers=layers, kfac=True)
    state = tx.init(case.params)
    assert (set(state.core.layers), set(state.core.fallback)) == ({"w"}, {"table"})
    step = stepper(tx, case.loss, layers)
    params, state, _ = step(case.params, state, *case.batch)
    assert int(state.core.skipped) == 0
    assert not np.array_equal(params["table"], case.params["table"])


def test_scale_by_singd_is_the_bare_preconditioner():
    given = {"layers": LAYERS, "recipe": "paper", "T": 2, "damping": 0.1}
    tx = optax.chain(singd_jax.scale_by_singd(**given), optax.scale(-0.05))
    params, _ = run(tx)
    whole = singd_jax.singd(0.05, momentum=0.0, **given)
    expected = start()
    state = whole.init(expected)
    step = stepper(whole)
    for _ in range(4):
        g = jax.grad(loss)(expected, X)
        new, state, _ = step(expected, state, X)
        expected = new | {"scale": expected["scale"] - 0.05 * g["scale"]}
    assert_close(params, expected)


def test_auxiliary_output():
    def with_aux(p, x):
        return loss(p, x), {"norm": jnp.sum(x)}

    tx = singd_jax.singd(0.02, layers=LAYERS)
    function = singd_jax.value_and_curvature(with_aux, LAYERS, has_aux=True)
    (value, aux), _, curvature = jax.jit(function)(start(), tx.init(start()), X)
    assert_close((value, aux["norm"]), (loss(start(), X), jnp.sum(X)))
    assert set(curvature) == {"v", "w"}


def test_donated_buffers():
    tx = singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False)
    step = stepper(tx, donate_argnums=(0, 1))
    params, state = start(), tx.init(start())
    for _ in range(3):
        params, state, _ = step(params, state, X)
    assert_close(params, run(tx, 3)[0])


def test_keys_and_keyword_arguments_pass_through():
    def noisy(p, x, key, *, rate, mode):
        assert mode == "train"
        return loss(p, x * jax.random.bernoulli(key, rate, x.shape))

    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        layers = singd_jax.find_layers(noisy)(start(), X, key, rate=0.5, mode="train")
        assert set(layers) == {"v", "w"}
        state = singd_jax.singd(layers=layers).init(start())
        function = singd_jax.value_and_curvature(noisy, layers)
        value, _, _ = jax.jit(functools.partial(function, rate=0.5, mode="train"))(
            start(), state, X, key
        )
        assert_close(value, noisy(start(), X, key, rate=0.5, mode="train"))


def test_a_scalar_of_numpy_is_a_number_as_in_jax():
    def repeated(p, x, times):
        return sum(loss(p, x) for _ in range(times))

    times = np.int64(2)
    layers = singd_jax.find_layers(repeated)(start(), X, times)
    state = singd_jax.singd(layers=layers).init(start())
    value, grads = singd_jax.value_and_grad(repeated)(start(), state, X, times)
    assert_close((value, grads.tree), jax.value_and_grad(repeated)(start(), X, times))


def test_an_equinox_module_is_trained_as_it_is():
    case = CASES["equinox_mlp"]()
    layers = singd_jax.find_layers(case.loss)(case.params, X)
    tx = singd_jax.singd(0.05, layers=layers)
    import equinox as eqx

    arrays, rest = eqx.partition(case.params, eqx.is_inexact_array)

    def of_arrays(arrays, x):
        return case.loss(eqx.combine(arrays, rest), x)

    params, state, first = stepper(tx, of_arrays, layers)(arrays, tx.init(arrays), X)
    model = eqx.combine(params, rest)

    state = tx.init(eqx.filter(case.params, eqx.is_inexact_array))
    function = eqx.filter_jit(singd_jax.value_and_curvature(case.loss, layers))
    value, grads, curvature = function(case.params, state, X)
    updates, _ = tx.update(grads, state, case.params, curvature=curvature)
    other = eqx.apply_updates(case.params, updates)
    assert_close(value, first)
    assert_close(eqx.filter(other, eqx.is_array), eqx.filter(model, eqx.is_array))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="an older flax")
def test_an_optimizer_of_nnx_steps_as_its_transformation_does():
    case = CASES["nnx_mlp"]()
    layers = singd_jax.find_layers(case.loss)(case.params, X)
    tx = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False)
    expected, state = case.params, tx.init(case.params)
    plain = stepper(tx, case.loss, layers)
    model = nnx.clone(case.params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        function = singd_jax.value_and_curvature(case.loss, layers)
        _, grads, curvature = function(model, nnx.as_pure(optimizer.opt_state), x)
        optimizer.update(model, grads, curvature=curvature)

    for _ in range(3):
        expected, state, _ = plain(expected, state, X)
        step(model, optimizer, X)
    assert_close(nnx.as_pure(model), nnx.as_pure(expected))


@pytest.mark.slow
def test_a_run_under_vmap_is_several_runs():
    tx = singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False)
    step = stepper(tx)
    single = start()
    params = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), single)
    state = jax.vmap(tx.init)(params)
    both = jax.jit(jax.vmap(lambda p, s: step(p, s, X)))
    for _ in range(3):
        params, state, _ = both(params, state)
    assert_close(jax.tree.map(lambda a: a[0], params), run(tx, 3)[0], 1e-5)


@pytest.mark.parametrize(
    "name", ["embedding", "tied_embedding", "linen_lstm", "experts", "arrays_without_entries"]
)
def test_training_lowers_the_loss(name):
    case = CASES[name]()
    layers = singd_jax.find_layers(case.loss, structures="diagonal")(case.params, *case.batch)
    tx = singd_jax.singd(0.05, layers=layers, T=2, growing_T=False)
    step = stepper(tx, case.loss, layers)
    params, state = case.params, tx.init(case.params)
    values = []
    for _ in range(8):
        params, state, value = step(params, state, *case.batch)
        values.append(float(value))
    assert values[-1] < 0.98 * values[0]
    assert int(state.core.skipped) == 0


def test_an_explicit_decay_of_zero_holds_for_what_adamw_trains():
    params = {"scale": jnp.ones(3)}
    for given, moved in (({"weight_decay": 0.0}, False), ({}, True)):
        tx = singd_jax.singd(**given, warmup=0)
        updates, _ = tx.update({"scale": jnp.zeros(3)}, tx.init(params), params)
        assert bool((updates["scale"] != 0.0).all()) is moved
