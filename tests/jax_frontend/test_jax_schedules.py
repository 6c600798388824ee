"""Rates that follow schedules, and settings in the state of `optax.inject_hyperparams`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_runs import LAYERS, assert_close, run, start, state_of, stepper

import singd_jax
from singd_core.optimizer import Fallback


@pytest.mark.parametrize("recipe", ["paper", "normalized"])
def test_schedules_of_every_rate(recipe):
    def falling(count):
        return 0.05 / (1 + count)

    rates = ("learning_rate", "momentum", "weight_decay", "lr_cov", "damping", "alpha1")
    fallback = Fallback(lr=falling, weight_decay=falling)
    given = dict.fromkeys(rates, falling)
    tx = singd_jax.singd(layers=LAYERS, recipe=recipe, T=1, fallback=fallback, **given)
    params, state = run(tx, steps=3)
    assert state.core.largest_lr == np.float32(0.05)

    expected, state = start(), tx.init(start())
    for i in range(3):  # the same with plain numbers, one step at a time
        plain = Fallback(lr=falling(i), weight_decay=falling(i))
        numbers = dict.fromkeys(rates, falling(i))
        one = singd_jax.singd(layers=LAYERS, recipe=recipe, T=1, fallback=plain, **numbers)
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


@pytest.mark.slow
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
    factors = state_of(run(scheduled)[1]).core.layers["w"].factors
    assert int(factors.averages.k) == 1  # steps 0 of 4: 1 % 3, 2 % 4 and 3 % 5 are not 0
    state.hyperparams["damping"] = jnp.asarray(0.5)
    other, _ = run(tx, 1, params, state)
    assert not np.allclose(other["v"], run(tx, 1, params, run(tx)[1])[0]["v"])


@pytest.mark.parametrize(("T", "growing"), [(1, False), (2, False), (2, True)])
def test_a_rate_of_64_bits_leaves_the_state_in_32(T, growing):
    with jax.enable_x64(True):
        rate = jnp.asarray(0.05, "float64")
        tx = singd_jax.singd(0.02, layers=LAYERS, T=T, growing_T=growing, lr_cov=rate)
        _, state = run(tx, 3)
        kinds = [[a.dtype for a in jax.tree.leaves(s)] for s in (state, tx.init(start()))]
        assert kinds[0] == kinds[1]
        assert "float64" not in kinds[0]


def test_a_rate_of_adamw_is_warned_about():
    text = "the size of a step.* default is 0.12: leave"
    for rate in (1e-3, optax.constant_schedule(1e-3)):
        with pytest.warns(UserWarning, match=text) as seen:
            singd_jax.singd(rate)
        assert [w.filename for w in seen] == [__file__]
    for rate in (jnp.asarray(1e-3), optax.linear_schedule(1e-3, 0.0, 9)):  # not looked into
        singd_jax.singd(rate)


@pytest.mark.parametrize("name", ["learning_rate", "lr_cov"])
def test_a_negative_rate_of_a_schedule_changes_nothing_and_is_counted(name):
    def passes_zero(count):
        return 0.05 * (2.0 - count)

    tx = singd_jax.singd(layers=LAYERS, T=1, **{name: passes_zero})
    step = stepper(tx)
    params, state = run(tx, steps=2, step=step)
    assert int(state.core.skipped) == 0
    params, state = run(tx, 1, params, state, step)
    new, after = run(tx, 2, params, state, step)
    assert_close(new, params, 0.0)
    assert int(after.core.skipped) == int(state.core.skipped) + 2


def test_a_negative_damping_of_the_bare_preconditioner_changes_nothing():
    tx = singd_jax.scale_by_singd(layers=LAYERS, T=1, damping=jnp.asarray(-1.0))
    params, state = run(tx, steps=1)
    assert_close(params, start(), 0.0)
    assert int(state.core.skipped) == 1
