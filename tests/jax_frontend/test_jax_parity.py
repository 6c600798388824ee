"""A model in jax and the same in torch, with copied weights, take the same steps."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from jax_cases import SEQUENCE, X, mean_square
from jax_twins import (
    PAPER,
    attention,
    batches,
    cnn,
    compare,
    jax_steps,
    mlp,
    table,
    tied,
    torch_steps,
    transformer,
)

import singd_jax

torch = pytest.importorskip("torch")

from singd_torch import SINGD  # noqa: E402

STRUCTURES = [
    "dense",
    "diagonal",
    "blockdiagonal:2",
    "tril",
    "triu",
    "triltoeplitz",
    "triutoeplitz",
    "trilbottomrightdiag:2",
    "triltopleftdiag:2",
    "triubottomrightdiag:2",
    "triutopleftdiag:2",
    "hierarchical:2,1",
]


@pytest.fixture(autouse=True)
def fresh_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# Mirror images of others, and parts of "hierarchical".
SLOW = {"triu", "triutoeplitz", "triubottomrightdiag:2", "triutopleftdiag:2", "tril", "dense"}


@pytest.mark.parametrize(
    "structure",
    [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in STRUCTURES],
)
def test_an_mlp_takes_the_steps_of_torch(structure):
    compare(mlp(), **PAPER, T=1, structures=(structure, structure))


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "normalized"},
        {"recipe": "normalized", "warmup": 3, "T": 3, "growing_T": False},
        {"recipe": "normalized", "structures": ("diagonal", "dense")},
        {"recipe": "normalized", "decoupled_weight_decay": False, "weight_decay": 0.1},
        PAPER | {"kfac": True, "T": 2},
        PAPER | {"normalize_lr_cov": True, "T": 2},
    ],
    ids=["normalized", "T=3", "diagonal", "coupled", "kfac", "normalized factor steps"],
)
def test_each_rule_means_what_it_means_in_torch(given):
    compare(mlp(), **given)


@pytest.mark.slow
@pytest.mark.parametrize("make", [cnn, transformer])
def test_a_cnn_and_a_transformer_take_the_steps_of_torch(make):
    compare(make(), recipe="normalized", T=2, growing_T=False)


@pytest.mark.parametrize("make", [cnn, transformer])
def test_reduced_rows_are_those_of_torch(make):
    # Not with the recipe "normalized": the gradients of keys add up to zero over positions, and a
    # start and damping relative to nothing make factors of rounding errors.
    compare(make(), **PAPER, T=2, kfac_approx="reduce")


@pytest.mark.parametrize("make", cases([mlp, tied, table], fast=[mlp]))
def test_the_same_layers_learn_from_gradients_as_in_torch(make):
    # Not the others: the gradient of a bias of keys is rounding, the groups of a convolution keep
    # their rows in torch, and packed projections are one matrix there.
    compare(make(), recipe="normalized", structures="diagonal")


@pytest.mark.parametrize("given", [{"recipe": "normalized"}, PAPER | {"T": 1}])
def test_a_tied_table_takes_the_steps_of_torch(given):
    compare(tied(), **given)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("make", [cnn, transformer, tied])
def test_every_structure_takes_the_steps_of_torch(make, structure):
    compare(make(), **PAPER, T=2, structures=(structure, structure))


SAVED = {"normalized": {"recipe": "normalized"}, "paper": {"recipe": "paper"}}
OTHERS = itertools.product(SAVED, [transformer, attention, cnn, tied, table])
SAVED |= {"diagonal": {"structures": "diagonal"}}
FAST = {("normalized", tied), ("paper", attention), ("paper", table), ("diagonal", mlp)}
DIAGONAL = itertools.product(["diagonal"], [mlp, tied])


@pytest.mark.parametrize(("recipe", "make"), cases([*OTHERS, *DIAGONAL], fast=FAST))
def test_a_run_saved_by_torch_goes_on_in_jax(recipe, make):
    twin, given = make(), SAVED[recipe] | {"T": 3}
    x, torch_x = batches(twin)
    optimizer = SINGD(twin.model, lr=0.05, **given)
    torch_steps(twin, optimizer, torch_x, 4)

    params = twin.params
    layers = singd_jax.find_layers(twin.loss)(params, x)
    tx = singd_jax.singd(0.05, layers=layers, **given)
    packed = [name for name in layers if name.startswith("w[")]
    names = [packed or name if name == "w" else name for name, _ in twin.leaves]
    flat = singd_jax.from_torch(optimizer.state_dict(), names, layers)
    state = singd_jax.unflatten(tx.init(params), flat)

    params, _ = jax_steps(twin, tx, layers, params, state, x, 3)
    torch_steps(twin, optimizer, torch_x, 3)
    for name, expected in twin.params.items():
        np.testing.assert_allclose(params[name], expected, atol=1e-5, rtol=1e-5)


def saved_mlp(dtype=torch.float32):
    twin = mlp()
    layers = singd_jax.find_layers(twin.loss)(twin.params, X)
    twin.model.to(dtype)
    optimizer = SINGD(twin.model, lr=0.05)
    torch_steps(twin, optimizer, torch.from_numpy(np.array(X)).to(dtype), 2)
    return optimizer.state_dict(), layers


def test_names_for_a_saved_run_are_checked():
    saved, layers = saved_mlp()
    with pytest.raises(ValueError, match="names has 1 entries"):
        singd_jax.from_torch(saved, ["v"], layers)
    with pytest.raises(
        ValueError, match=r"names\[0\] = 'scale': it has a momentum, and the layers"
    ):
        singd_jax.from_torch(saved, ["scale", "a", "w", "b"], layers)
    with pytest.raises(
        ValueError, match=r"names\[0\] = 'w': .* \(5, 4\), where 1 of 3 × 5 numbers"
    ):
        singd_jax.from_torch(saved, ["w", "b", "v", "a"], layers)
    with pytest.raises(ValueError, match=r"names\[1\] = \['a', 'b'\]: .* \(5,\), where 2 of 5 × 1"):
        singd_jax.from_torch(saved, ["v", ["a", "b"], "w", "b"], layers)
    del saved["state"][0]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"names\[0\] = \['q', 'k'\]: .* 2 packed layers"):
        singd_jax.from_torch(saved, [["q", "k"], "a", "w", "b"], layers)


def test_packed_momenta_are_divided_among_parameters_of_their_own():
    def heads(p, x):
        q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in ("q", "k", "v"))
        return mean_square(q * k) + mean_square(v)

    params = {name: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for name in ("q", "k", "v")}
    layers = singd_jax.find_layers(heads)(params, SEQUENCE)
    twin = attention()
    optimizer = SINGD(twin.model, lr=0.05)
    torch_steps(twin, optimizer, batches(twin)[1], 2)
    saved = optimizer.state_dict()
    saved["state"] = {i: saved["state"][i] for i in (0, 1)}
    names = [[f"{name}.{leaf}" for name in params] for leaf in ("kernel", "bias")]
    flat = singd_jax.from_torch(saved, names, layers)
    state = singd_jax.unflatten(singd_jax.singd(layers=layers).init(params), flat)
    for i, name in enumerate(params):
        for momentum, j in zip(state.core.layers[f"{name}.kernel"].momenta, (0, 1), strict=True):
            expected = saved["state"][j]["momentum_buffer"].chunk(3)[i]
            np.testing.assert_array_equal(momentum, expected.numpy().T)


def test_a_run_in_bfloat16_keeps_its_dtypes():
    saved, layers = saved_mlp(torch.bfloat16)
    flat = singd_jax.from_torch(saved, ["v", "a", "w", "b"], layers)
    for name, index in {"v.momentum_buffer": 0, "v.bias_momentum_buffer": 1}.items():
        expected = saved["state"][index]["momentum_buffer"]
        assert flat[name].dtype == "bfloat16"
        np.testing.assert_array_equal(flat[name].astype("float32"), expected.float().numpy().T)
