"""SINGD among the transformations of optax, and under those of jax."""

import functools

import jax
import jax.numpy as jnp
import jax_layout_cases  # noqa: F401 - adds its cases
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax_cases import CASES, N, X, array, mean_square

import singd_jax
from singd_core.optimizer import Fallback
from singd_jax._state import find_state, find_states


def loss(p, x):
    x = jnp.tanh(x @ p["v"] + p["a"]) * p["scale"]
    return mean_square(x @ p["w"] + p["b"])


def start():
    return {
        "v": array(4, 5),
        "a": array(5),
        "scale": 1.0 + array(5),
        "w": array(5, 3),
        "b": array(3),
    }


LAYERS = singd_jax.find_layers(loss, structures="dense")(start(), X)


def stepper(tx, loss=loss, layers=LAYERS, **jit):
    @functools.partial(jax.jit, **jit)
    def step(params, state, *batch):
        value, grads, curvature = singd_jax.value_and_curvature(loss, layers)(params, state, *batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    return step


def run(tx, steps=4, params=None, state=None, step=None):
    params = start() if params is None else params
    state = tx.init(params) if state is None else state
    step = step or stepper(tx)
    for _ in range(steps):
        params, state, _ = step(params, state, X)
    return params, state


def assert_close(got, expected, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), got, expected)


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


def test_complex_parameters_follow_optax_adamw():
    case = CASES["complex_numbers"]()
    layers = singd_jax.find_layers(case.loss)(case.params, X)
    fallback = Fallback(lr=0.01, weight_decay=0.1)
    tx, adamw = (
        singd_jax.singd(0.0, layers=layers, warmup=0, fallback=fallback),
        optax.adamw(0.01, weight_decay=0.1),
    )
    params, state = case.params, tx.init(case.params)
    expected, adam_state = params["c"], adamw.init(params["c"])
    step = jax.jit(functools.partial(tx.update, curvature=None))
    for _ in range(3):
        grads = jax.tree.map(jnp.conj, jax.grad(case.loss)(params, X))
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        u, adam_state = adamw.update(grads["c"], adam_state, expected)
        expected = expected + u
    assert_close(params["c"], expected)
    assert state.core.fallback["c"].exp_avg_sq.dtype == "float32"
    with pytest.raises(ValueError, match="c is complex, and optax"):
        singd_jax.MultiSteps(tx, 2, layers=layers).init(params)


@pytest.mark.parametrize("branch", ["step", "layer"])
def test_between_refreshes_the_factors_stay_and_the_curvature_is_zeros(branch):
    tx = singd_jax.singd(0.02, layers=LAYERS, T=3, recipe="paper")
    state, params = tx.init(start()), start()
    vac = jax.jit(singd_jax.value_and_curvature(loss, LAYERS, branch=branch))
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


def test_schedules_of_every_rate():
    def falling(count):
        return 0.05 / (1 + count)

    rates = ("learning_rate", "momentum", "weight_decay", "lr_cov", "damping", "alpha1")
    fallback = Fallback(lr=falling, weight_decay=falling)
    given = dict.fromkeys(rates, falling)
    tx = singd_jax.singd(layers=LAYERS, recipe="paper", T=1, fallback=fallback, **given)
    params, _ = run(tx, steps=3)

    expected, state = start(), tx.init(start())
    for i in range(3):  # the same with plain numbers, one step at a time
        plain = Fallback(lr=falling(i), weight_decay=falling(i))
        numbers = dict.fromkeys(rates, falling(i))
        one = singd_jax.singd(layers=LAYERS, recipe="paper", T=1, fallback=plain, **numbers)
        expected, state = run(one, 1, expected, state)
    assert_close(params, expected)


@pytest.mark.parametrize(
    ("schedule", "constant"),
    [
        (lambda c: 0.5 * c, False),
        (lambda c: 0.5 / (1 + c.astype(jnp.float32)), False),
        (lambda c: 0.0 if c < 1 else 0.5, False),  # where a step is not compiled
        (optax.linear_schedule(0.0, 0.9, 10), False),
        (optax.constant_schedule(0.0), True),
        (0.0, True),
        (jnp.zeros(()), False),
    ],
)
def test_what_is_kept_does_not_depend_on_where_a_schedule_starts(schedule, constant):
    given = {"recipe": "paper", "momentum": schedule, "alpha1": schedule}
    state = singd_jax.singd(0.1, layers=LAYERS, **given).init(start())
    layer = state.core.layers["w"]
    assert (layer.momentum_buffer is None, layer.factors.m_K is None) == (constant, constant)


def test_a_schedule_that_reads_its_count_is_for_steps_that_are_not_compiled():
    rising = {"momentum": lambda c: 0.0 if c < 1 else 0.5}
    tx = singd_jax.singd(0.02, layers=LAYERS, **rising)
    params, _ = run(tx, 2, step=stepper(tx).__wrapped__)
    traced = singd_jax.singd(0.02, layers=LAYERS, momentum=lambda c: jnp.where(c < 1, 0.0, 0.5))
    assert_close(params, run(traced, 2)[0], 1e-5)


@pytest.mark.slow
def test_inject_hyperparams():
    tx = optax.inject_hyperparams(singd_jax.singd)(
        learning_rate=lambda count: 0.02 / (1 + count),
        layers=LAYERS,
        damping=0.2,
        T=2,
        growing_T=False,
    )
    params, state = run(tx)
    plain = singd_jax.singd(
        lambda c: 0.02 / (1 + c), layers=LAYERS, damping=0.2, T=2, growing_T=False
    )
    assert_close(params, run(plain)[0])
    assert float(state.hyperparams["damping"]) == np.float32(0.2)
    scheduled = optax.inject_hyperparams(singd_jax.singd)(
        0.02, layers=LAYERS, T=lambda count: 2 + count, growing_T=False
    )
    factors = find_state(run(scheduled)[1]).core.layers["w"].factors
    assert int(factors.averages.k) == 1  # steps 0 of 4: 1 % 3, 2 % 4 and 3 % 5 are not 0
    state.hyperparams["damping"] = jnp.asarray(0.5)
    other, _ = run(tx, 1, params, state)
    assert not np.allclose(other["v"], run(tx, 1, params, run(tx)[1])[0]["v"])


def test_chain_finds_its_state_and_passes_the_curvature_on():
    tx = optax.chain(
        optax.clip_by_global_norm(1e9), singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False)
    )
    assert_close(run(tx)[0], run(singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False))[0])
    with pytest.raises(ValueError, match="holds no state of singd"):
        run(optax.sgd(0.1))


def test_masked_leaves_parameters_out():
    tx = optax.masked(
        singd_jax.singd(0.02, layers=LAYERS, T=1), {k: k not in ("v", "a") for k in start()}
    )
    state = tx.init(start())
    assert set(find_state(state).core.layers) == {"w"}
    _, grads, curvature = jax.jit(singd_jax.value_and_curvature(loss, LAYERS))(start(), state, X)
    assert set(curvature) == {"w"}
    updates, _ = jax.jit(tx.update)(grads, state, start(), curvature=curvature)
    assert_close(updates["v"], grads["v"], 0.0)  # what masked does with the rest


@pytest.mark.parametrize(
    ("T", "branch"),
    [
        (1, "step"),
        (2, "layer"),
        pytest.param(1, "layer", marks=pytest.mark.slow),
        pytest.param(2, "step", marks=pytest.mark.slow),
    ],
)
def test_groups_with_settings_of_their_own(T, branch):
    groups = {
        "first": singd_jax.singd(0.02, layers=LAYERS, T=T, growing_T=False, structures="diagonal"),
        "last": singd_jax.singd(0.02, layers=LAYERS, T=3, recipe="paper"),
    }
    labels = {"v": "first", "a": "first", "scale": "first", "w": "last", "b": "last"}

    tx = optax.multi_transform(groups, labels)
    function = jax.jit(singd_jax.value_and_curvature(loss, LAYERS, branch=branch))
    update = jax.jit(tx.update)
    params, state = start(), tx.init(start())
    single = {
        k: optax.masked(group, {leaf: label == k for leaf, label in labels.items()})
        for k, group in groups.items()
    }
    alone = {k: masked.init(params) for k, masked in single.items()}
    for _ in range(4):
        _, grads, curvature = function(params, state, X)
        updates, state = update(grads, state, params, curvature=curvature)
        for k, masked in single.items():  # each as if it were alone
            _, _, own = function(params, alone[k], X)
            expected, alone[k] = masked.update(grads, alone[k], params, curvature=own)
            for leaf, label in labels.items():
                if label == k:
                    assert_close(updates[leaf], expected[leaf])
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="holds 2 states of singd where one is needed"):
        singd_jax.flatten(state)
    twice = optax.chain(*groups.values())
    with pytest.raises(ValueError, match="two transformations of singd train v, w"):
        run(twice)


def test_a_group_may_be_a_branch_of_the_parameters_or_all_of_them():
    def nested(p, x):
        return loss(p["all"] | p["none"], x)

    params = {"all": start(), "none": {}}
    layers = singd_jax.find_layers(nested)(params, X)
    tx = singd_jax.singd(0.02, layers=layers)
    whole, _, _ = stepper(tx, nested, layers)(params, tx.init(params), X)
    for labels in ({"all": "a", "none": "b"}, "a"):
        groups = optax.multi_transform({"a": tx, "b": tx}, labels)
        state = groups.init(params)
        sizes = [len(own.core.layers) for own in find_states(state)]
        assert sizes == [2, 0]
        new, state, _ = stepper(groups, nested, layers)(params, state, X)
        assert [int(own.core.step) for own in find_states(state)] == [1, 1]
        assert_close(new, whole)


def test_a_name_is_not_that_of_a_transposed_use():
    def loss(p, x):
        return mean_square(x @ p["w"] @ p["w"].T + x @ p["w transposed"])

    def untied(p, x):
        return mean_square(x @ p["w"] + x @ p["w transposed"])

    params = {"w": array(4, 4), "w transposed": array(4, 4, seed=1)}
    with pytest.raises(ValueError, match="'w transposed' is the name of a parameter, and"):
        singd_jax.find_layers(loss)(params, X)
    layers = singd_jax.find_layers(untied)(params, X)
    tx = singd_jax.singd(0.02, layers=layers, T=1)
    _, state, _ = stepper(tx, untied, layers)(params, tx.init(params), X)
    assert int(state.core.layers["w transposed"].factors.averages.k) == 1


def test_multi_steps_of_optax_accumulate_gradients():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    tx = optax.MultiSteps(plain, every_k_schedule=2)
    params, state = run(tx, steps=4)  # of equal batches: two steps of the plain one
    assert int(state.gradient_step) == 2
    assert_close(params, run(plain, steps=2)[0])


@pytest.mark.slow
def test_multi_steps_in_a_chain():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    clip, own = optax.clip_by_global_norm(1e9), singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    params, state = run(optax.chain(clip, own.gradient_transformation()), steps=4)
    assert int(find_state(state).core.layers["w"].factors.averages.k) == 2
    assert_close(params, run(plain, steps=2)[0])
    optax_steps = optax.MultiSteps(plain, 2).gradient_transformation()
    for lost in (optax.chain(clip, optax_steps), optax.masked(optax_steps, True)):
        with pytest.raises(ValueError, match=r"take singd_jax\.MultiSteps"):
            run(lost)
    with pytest.raises(ValueError, match=r"put its gradient_transformation\(\)"):
        run(optax.chain(clip, own))
    kept = optax.MultiSteps(optax.chain(clip, plain), 2).gradient_transformation()
    assert_close(run(kept, steps=4)[0], params)


def tied_loss(p, x):
    y = jnp.tanh(x @ p["v"] + p["a"]) @ p["w"]
    return mean_square(y @ p["v"] @ p["v"].T)


IN_GAPS, KFAC = {"T": 2, "growing_T": False}, {"recipe": "paper", "T": 1, "kfac": True}


@pytest.mark.parametrize(
    ("loss_average", "given"),
    [
        ("batch", IN_GAPS),
        (None, KFAC),
        pytest.param("batch", KFAC, marks=pytest.mark.slow),
        pytest.param(None, IN_GAPS, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_are_one_large_batch(loss_average, given):
    params = {"v": array(4, 5), "a": array(5), "w": array(5, 4)}
    scale = 1.0 if loss_average else float(N)

    def loss(p, x):
        return tied_loss(p, x) * (scale * len(x) / N if loss_average is None else 1.0)

    layers = singd_jax.find_layers(loss, loss_average=loss_average)(params, X)
    assert layers["v"].transposed
    plain = singd_jax.singd(0.02, layers=layers, **given)
    tx = singd_jax.MultiSteps(plain, 3, layers=layers)
    step, whole = stepper(tx, loss, layers), stepper(plain, loss, layers)
    state, expected, plain_state = tx.init(params), params, plain.init(params)
    for i in range(3):
        x = (1.0 + i) * X
        for part in x.reshape(3, 2, 4):
            params, state, _ = step(params, state, part)
        expected, plain_state, _ = whole(expected, plain_state, x)
    # float32: the sum of the gradients of three parts is rounded in another order
    assert_close(params, expected, 1e-5)
    assert_close(find_state(state).core.layers, plain_state.core.layers, 1e-4)


def test_micro_batches_may_be_skipped_and_need_a_curvature():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS, should_skip_update_fn=optax.skip_not_finite)
    step, params, state = stepper(tx), start(), tx.init(start())
    for x in (X, X * jnp.nan, X):
        params, state, _ = step(params, state, x)
    assert int(state.gradient_step) == 1
    assert_close(params, run(plain, steps=1)[0])
    with pytest.raises(ValueError, match="curvature=curvature"):
        tx.update(params, state, params)


def test_a_micro_batch_that_is_not_finite_spoils_one_step_alone():
    plain = singd_jax.singd(0.02, layers=LAYERS, T=1, warmup=0)
    tx = singd_jax.MultiSteps(plain, 2, layers=LAYERS)
    step, params, state = stepper(tx), start(), tx.init(start())
    for x in (X, X * jnp.nan, X, X):
        params, state, _ = step(params, state, x)
    assert int(find_state(state).core.skipped) == 1
    assert_close(params, run(plain, steps=1)[0])


def test_layers_of_other_parameters_are_told_of():
    tx = singd_jax.singd(0.02, layers=LAYERS)
    with pytest.raises(ValueError, match="the parameters have no 'a', which the layers were found"):
        tx.init({"other": X})
    params = {"other": array(4, 3)}
    other = singd_jax.find_layers(lambda p, x: mean_square(x @ p["other"]))(params, X)
    with pytest.raises(ValueError, match="the state has the layers v, w, and the layers are other"):
        singd_jax.value_and_curvature(loss, other)(start(), tx.init(start()), X)
    state = singd_jax.singd(0.02, layers=other).init(params)
    function = singd_jax.value_and_curvature(lambda p, x: mean_square(x @ p["other"]), other)
    _, _, curvature = function(params, state, X)
    with pytest.raises(ValueError, match="the curvature is of the layers other, and the state of"):
        tx.update(start(), tx.init(start()), start(), curvature=curvature)


@pytest.mark.parametrize(
    "make", [functools.partial(singd_jax.singd, 0.1), singd_jax.scale_by_singd]
)
def test_a_leaf_that_does_not_fit_is_named(make):
    tx, params = make(layers=LAYERS), start()
    state = tx.init(params)
    without = {k: v for k, v in params.items() if k != "a"}
    turned = params | {"v": params["v"].T}
    function = singd_jax.value_and_curvature(lambda p, x: jnp.sum(p["v"]), LAYERS)
    check = singd_jax.check(lambda p, x: jnp.sum(p["v"]), LAYERS)
    for use in (
        tx.init,
        lambda p: tx.update(p, state, params, curvature=None),
        lambda p: function(p, state, X),
        lambda p: check(p, X),
    ):
        with pytest.raises(ValueError, match="have no 'a', which the layers were found with"):
            use(without)
        with pytest.raises(ValueError, match=r"'v' has shape \(5, 4\) .* and had \(4, 5\)"):
            use(turned)
    with pytest.raises(ValueError, match="'z' is none of the parameters"):
        tx.init(params | {"z": X})
    with pytest.raises(ValueError, match=r"'scale' has shape \(6, 4\)"):
        tx.init(params | {"scale": X})


def test_parameters_further_than_those_of_the_state_are_named():
    tx = singd_jax.singd(0.1, layers=LAYERS)
    state = tx.init(start())
    with pytest.raises(ValueError, match="'z' is none of the parameters"):
        tx.update(start() | {"z": X}, state, start(), curvature=None)
    without = {k: v for k, v in start().items() if k != "scale"}
    with pytest.raises(ValueError, match="the parameters have no 'scale'"):
        tx.update(start(), state, without, curvature=None)


def test_the_bare_preconditioner_takes_settings_of_the_factors_alone():
    tx = optax.inject_hyperparams(singd_jax.scale_by_singd)(layers=LAYERS, damping=0.2, T=1)
    plain = singd_jax.scale_by_singd(layers=LAYERS, damping=0.2, T=1)
    # an array for the damping is rounded elsewhere than a constant, and steps of rate 1 are long
    assert_close(run(tx)[0], run(plain)[0], 1e-5)
    with pytest.raises(TypeError, match="momentum"):
        singd_jax.scale_by_singd(layers=LAYERS, momentum=0.9)
    with pytest.raises(ValueError, match=r"T=1\.5: must be an integer"):
        singd_jax.singd(0.02, layers=LAYERS, T=1.5)


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


def test_the_batch_size_must_be_seen_or_told():
    def indexed(p, x, rows):
        return loss(p, x[rows])

    def both(p, x, rows):
        return loss(p, x[rows]) + loss(p, x)

    rows = jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"batch\[0\] 6, batch\[1\] 2"):
        singd_jax.find_layers(both)(start(), X, rows)
    layers = singd_jax.find_layers(both, batch_size=lambda x, rows: len(rows))(start(), X, rows)
    assert set(layers) == {"v", "w"}
    tx = singd_jax.singd(layers=LAYERS, T=1)
    state = tx.init(start())
    _, _, expected = singd_jax.value_and_curvature(loss, LAYERS)(start(), state, X[rows])
    found = singd_jax.find_layers(indexed)(start(), X, rows)  # all layers multiply two rows
    _, _, seen = singd_jax.value_and_curvature(indexed, found)(start(), state, X, rows)
    assert_close(seen, expected)


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), start())
    x = X.astype(dtype)
    layers = singd_jax.find_layers(loss)(params, x)
    tx = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False)
    step = stepper(tx, layers=layers)
    state = tx.init(params)
    values = []
    for _ in range(6):
        params, state, value = step(params, state, x)
        values.append(float(value))
    assert values[-1] < values[0]
    assert int(state.core.skipped) == 0
    assert {a.dtype.name for a in jax.tree.leaves(params)} == {dtype}
    factor = "float32" if dtype == "float16" else dtype
    assert state.core.layers["v"].factors.K.matrix.dtype == factor


def test_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype("float64"), start())
        x = X.astype("float64")
        layers = singd_jax.find_layers(loss, structures="dense")(params, x)
        tx = singd_jax.singd(0.02, layers=layers, T=2, growing_T=False)
        step = stepper(tx, layers=layers)
        state = tx.init(params)
        for _ in range(3):
            params, state, _ = step(params, state, x)
        assert {a.dtype.name for a in jax.tree.leaves(params)} == {"float64"}
        assert state.core.layers["v"].factors.K.matrix.dtype == "float64"
        gaps = singd_jax.check(loss, layers)(params, x)
        assert max(gaps.values()) < 1e-14
    assert_close(
        params, run(singd_jax.singd(0.02, layers=LAYERS, T=2, growing_T=False), 3)[0], 1e-5
    )


@pytest.mark.parametrize(("T", "growing"), [(1, False), (2, False), (2, True)])
def test_a_rate_of_64_bits_leaves_the_state_in_32(T, growing):
    with jax.enable_x64(True):
        rate = jnp.asarray(0.05, "float64")
        tx = singd_jax.singd(0.02, layers=LAYERS, T=T, growing_T=growing, lr_cov=rate)
        _, state = run(tx, 3)
        kinds = [[a.dtype for a in jax.tree.leaves(s)] for s in (state, tx.init(start()))]
        assert kinds[0] == kinds[1]
        assert "float64" not in kinds[0]


def test_setting_errors_name_the_setting():
    with pytest.raises(ValueError, match="T=0"):
        singd_jax.singd(layers=LAYERS, T=0)
    with pytest.raises(ValueError, match=r"T=.*: must be a number of steps; optax"):
        singd_jax.singd(layers=LAYERS, T=lambda count: 10)
    with pytest.raises(ValueError, match="structures"):
        singd_jax.singd(layers=LAYERS, structures="dens")
    with pytest.raises(ValueError, match="loss_average"):
        singd_jax.find_layers(loss, loss_average="mean")


UNCALLED, PLAIN = singd_jax.find_layers(loss), singd_jax.singd(layers=LAYERS)
SECOND = r"layers must be what .*find_layers\(loss\)\(params, .*; the second call is missing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: singd_jax.singd(layers=UNCALLED), SECOND),
        (lambda: singd_jax.value_and_curvature(loss, UNCALLED), SECOND),
        (lambda: singd_jax.check(loss, UNCALLED), SECOND),
        (lambda: singd_jax.MultiSteps(PLAIN, 2, layers=UNCALLED), SECOND),
        (lambda: singd_jax.singd(layers={}), "layers must be .* not a dict$"),
        (lambda: singd_jax.singd(b1=0.9), "no argument 'b1': b1 is 'momentum' here"),
        (lambda: singd_jax.singd(eps=1e-8), r"'damping' here; .*fallback=Fallback\(eps=...\)"),
        (lambda: singd_jax.singd(lr=0.1), "no argument 'lr': was 'learning_rate' meant"),
        (lambda: singd_jax.singd(linen.Dense(3)), "learning_rate must be a number or a schedule"),
        (lambda: singd_jax.singd(damping=lambda t: jnp.ones(2)), "damping must be a number or a"),
        (lambda: singd_jax.singd(damping=lambda t: (t, t)), "damping must be a number or a"),
    ],
)
def test_what_is_given_in_place_of_something_else_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_filtered_equinox_module_is_told_of():
    import equinox as eqx

    case = CASES["equinox_mlp"]()
    filtered = eqx.filter(case.params, eqx.is_inexact_array)
    with pytest.raises(TypeError, match=r"model itself, .* not a filtered one"):
        singd_jax.singd(loss=case.loss).init(filtered, *case.batch)


def test_a_rate_of_adamw_is_warned_about():
    text = "the size of a step.* default is 0.12: leave"
    for rate in (1e-3, optax.constant_schedule(1e-3)):
        with pytest.warns(UserWarning, match=text) as seen:
            singd_jax.singd(rate)
        assert [w.filename for w in seen] == [__file__]
    for rate in (jnp.asarray(1e-3), optax.linear_schedule(1e-3, 0.0, 9)):  # not looked into
        singd_jax.singd(rate)


def test_an_explicit_decay_of_zero_holds_for_what_adamw_trains():
    params = {"scale": jnp.ones(3)}
    for given, moved in (({"weight_decay": 0.0}, False), ({}, True)):
        tx = singd_jax.singd(**given, warmup=0)
        updates, _ = tx.update({"scale": jnp.zeros(3)}, tx.init(params), params)
        assert bool((updates["scale"] != 0.0).all()) is moved
