"""Gradients that carry their curvature, of models of flax.nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_cases import X
from jax_runs import assert_close
from test_jax_carried import Y

import singd_jax


class Noisy(nnx.Module):
    """A model whose variables change while it runs."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="an older flax")
@pytest.mark.parametrize("T", [1, 2])
def test_what_a_model_of_nnx_changes_is_kept(T):
    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    model, other = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    layers = singd_jax.find_layers(loss)(model, X, Y)
    assert set(layers) == {"first.kernel", "last.kernel"}
    assert set(layers.others) == {"norm.scale", "norm.bias"}
    optimizer = nnx.Optimizer(model, singd_jax.singd(0.0, layers=layers, T=T), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = singd_jax.value_and_grad(loss)(model, optimizer.opt_state, x, y)
        optimizer.update(model, grads.tree, curvature=grads.curvature)
        return value

    plain = singd_jax.value_and_grad(loss)
    with pytest.raises(ValueError, match=r"curvature=grads\.curvature\).*nnx\.Optimizer"):
        optimizer.update(model, plain(Noisy(nnx.Rngs(0)), optimizer.opt_state, X, Y)[1])
    for _ in range(3):
        value = step(model, optimizer, X, Y)
        expected, _ = nnx.value_and_grad(loss)(other, X, Y)
        if optimizer.step[...] == 1:  # the rate of AdamW is not 0
            assert_close(value, expected, 1e-6)
    assert int(model.drop.rngs.count[...]) == int(other.drop.rngs.count[...]) == 3
    assert_close(model.norm.mean[...], other.norm.mean[...], 1e-5)
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0.0


def test_a_variable_of_nnx_in_two_places_is_split_first():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.again = nnx.Sequential(self.cell, jnp.tanh)

        def __call__(self, x):
            return self.again(self.cell(x))

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"are one variable of the model: .* nnx\.split"):
        singd_jax.find_layers(loss)(model, X)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def split(params, x):
        return loss(nnx.merge(graph, params, rest), x)

    layers = singd_jax.find_layers(split)(params, X)
    assert [layer.uses for layer in layers.values()] == [2]


def test_some_variables_of_nnx_are_layers_of_a_loss_of_them():
    def loss(model, x):
        return jnp.mean(jnp.tanh(model(x)) ** 2)

    model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    whole = singd_jax.singd(layers=singd_jax.find_layers(loss)(model, X))
    with pytest.raises(ValueError, match=r"wrt=.*nnx\.split\(model, wrt, \.\.\.\)"):
        nnx.Optimizer(model, whole, wrt=nnx.LoRAParam)
    graph, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    layers = singd_jax.find_layers(lambda p, x: loss(nnx.merge(graph, p, rest), x))(params, X)
    optimizer = nnx.Optimizer(model, singd_jax.singd(layers=layers), wrt=nnx.LoRAParam)
    assert set(layers) == set(optimizer.opt_state.layers) == {"lora.lora_a", "lora.lora_b"}


@pytest.mark.slow
def test_variables_of_nnx_are_those_that_are_trained():
    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    tx = singd_jax.singd(loss=loss)
    model = Noisy(nnx.Rngs(0))
    state = tx.init(model, X, Y)
    value, grads = singd_jax.value_and_grad(loss)(model, state, X, Y)
    updates, _ = tx.update(grads, state, model)
    assert np.isfinite(value)
    assert sorted(a.shape for a in jax.tree.leaves(updates)) == sorted(
        a.shape for a in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
