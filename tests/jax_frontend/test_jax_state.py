"""The state is a pytree of arrays that every format takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import X
from jax_runs import LAYERS, run, start

import singd_jax
from singd_core import state as flat_state
from singd_core.layers import Linear
from singd_core.optimizer import Optimizer
from singd_core.structures import Diagonal, structure

_BFLOAT16 = r"'v\.K\.matrix' was saved in a dtype that NumPy .* and float32 is needed"


def optimizer(recipe="paper", **given):
    given = {"T": 3, "growing_T": False} | given
    return singd_jax.singd(0.02, layers=LAYERS, recipe=recipe, **given)


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_state_is_arrays_alone():
    state = optimizer().init(start())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    doubled = jax.tree.map(lambda a: 2 * a, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert jax.tree.structure(jax.eval_shape(optimizer().init, start())) == jax.tree.structure(
        state
    )


def test_every_state_can_be_printed():
    params = start()
    assert "Fixed(" in repr(optimizer().init(params))
    state = singd_jax.singd().init(params)
    assert f"Fixed({', '.join(state.layers)})" in repr(state)
    assert "Fixed(" in str(jax.tree.structure(state))  # as in JAX's errors about trees


@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [
        ("float32", "normalized"),
        pytest.param("bfloat16", "paper", marks=pytest.mark.slow),
        pytest.param("float32", "paper", marks=pytest.mark.slow),
        pytest.param("bfloat16", "normalized", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_a_flat_file(tmp_path, dtype, recipe):
    own = optimizer(recipe, preconditioner_dtype=(dtype, dtype))
    tx = optax.chain(optax.clip_by_global_norm(1e9), own)
    params, state = run(tx, 4)
    np.savez(tmp_path / "state.npz", **singd_jax.flatten(state))
    with np.load(tmp_path / "state.npz") as saved:
        restored = singd_jax.unflatten(tx.init(params), saved)
    assert_equal(restored, state)
    assert_equal(run(tx, 3, params, restored), run(tx, 3, params, state))
    if dtype == "bfloat16" and recipe == "paper":
        with np.load(tmp_path / "state.npz") as saved, pytest.raises(ValueError, match=_BFLOAT16):
            singd_jax.unflatten(optimizer().init(params), saved)


def test_names_are_those_of_every_frontend():
    names = singd_jax.flatten(optimizer().init(start()))
    assert {"step", "skipped", "v.K.matrix", "w.m_C.matrix", "w.momentum_buffer"} <= set(names)
    assert {"scale.exp_avg", "scale.exp_avg_sq", "scale.step", "v.averages.k"} <= set(names)
    names = singd_jax.flatten(optimizer("normalized").init(start()))
    assert {"v.momentum_buffer", "v.bias_momentum_buffer", "v.late.squares"} <= set(names)


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_a_run_goes_on_in_the_core(recipe):
    given = {"lr": 0.02, "recipe": recipe, "structures": ("dense", "dense")}
    _, state = run(singd_jax.singd(given["lr"], layers=LAYERS, recipe=recipe, T=1), 4)

    def layered(p):
        p = jax.tree.map(np.asarray, p)
        return {"v": (p["v"], p["a"]), "w": (p["w"], p["b"]), "scale": p["scale"]}

    kinds = dict.fromkeys(("v", "w"), Linear(transposed=True))
    core = Optimizer(kinds, T=1, **given)
    flat = singd_jax.flatten(state)
    restored = flat_state.unflatten(core.init(layered(start())), flat)
    grads = jax.tree.map(lambda a: a**2, start())
    expected, stepped = core.update(layered(grads), restored, layered(start()))

    tx = singd_jax.singd(given["lr"], layers=LAYERS, recipe=recipe, T=1)
    again = singd_jax.unflatten(tx.init(start()), flat_state.flatten(restored))
    update = functools.partial(tx.update, curvature=None)
    updates, new = jax.jit(update)(grads, again, start())
    for name, change in layered(updates).items():
        for got, wanted in zip(*map(jax.tree.leaves, (change, expected[name])), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    for name, array in flat_state.flatten(stepped).items():
        np.testing.assert_allclose(singd_jax.flatten(new)[name], array, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    tx = optimizer()
    flat = singd_jax.flatten(tx.init(start()))
    without = {k: v for k, v in flat.items() if "matrix" not in k}
    diagonal = optimizer(structures="diagonal").init(start())
    with pytest.raises(ValueError, match=r"no 'v\.K\.diag'"):
        singd_jax.unflatten(diagonal, without)
    with pytest.raises(ValueError, match="no 'step': is it what `flatten` returned"):
        singd_jax.unflatten(tx.init(start()), {k: v for k, v in flat.items() if k != "step"})
    with pytest.raises(ValueError, match=r"'w\.K\.matrix' has shape"):
        singd_jax.unflatten(tx.init(start()), flat | {"w.K.matrix": jnp.eye(2)})


def test_orbax_saves_and_restores_it(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = optimizer()
    params, state = run(tx, 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        template = jax.tree.map(jnp.zeros_like, {"params": params, "state": state})
        restored = checkpointer.restore(tmp_path / "run", template)
    assert_equal(restored, {"params": params, "state": state})


def test_a_structure_of_a_user_is_a_pytree_too():
    @structure
    class Mine(Diagonal):
        diag: object

    layers = singd_jax.find_layers(lambda p, x: jnp.mean(jnp.tanh(x @ p) ** 2), structures=Mine)
    found = layers(jnp.ones((4, 2)), X)
    state = singd_jax.singd(layers=found).init(jnp.ones((4, 2)))
    assert isinstance(jax.tree.map(jnp.zeros_like, state).core.layers["params"].factors.K, Mine)
