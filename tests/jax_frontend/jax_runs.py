"""What tests of whole runs share: a small model, its layers, steps and states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_cases import X, array, mean_square

import singd_jax


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


def states_of(opt_state):
    """The states of singd in the state of an optimizer of optax."""

    def is_state(node):
        return isinstance(node, singd_jax.SingdState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]


def state_of(opt_state):
    """The only one."""
    [state] = states_of(opt_state)
    return state
