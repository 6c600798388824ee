"""On eight fake devices a step is what it is on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from singd_jax import find_layers

FLAGS = "--xla_force_host_platform_device_count=8"


# Diagonal factors learn from gradients, and all others from rows.
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("diagonal", "dense", "hierarchical:1,1")
]


@pytest.fixture(scope="module", params=SLOW)
def found(request):
    """What `sharded_run.py` found in a process of its own: devices are made at start."""
    script = Path(__file__).with_name("sharded_run.py")
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"}
    done = subprocess.run(
        [sys.executable, str(script), request.param],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"structures": request.param}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "gspmd",
        "few_rows_of_divided_data",
        "explicit",
        "explicit_without_context",
        "explicit_parameters",
        "shard_map_in_the_loss",
        "unchecked_shard_map_in_the_loss",
        "unchecked_shard_map_with_constants",
        "unchecked_shard_map_with_one_axis",
        "mean_over_terms",
        "step_in_shard_map",
    ],
)
def test_sharded_steps_are_those_of_one_device(found, how):
    assert found[how] < 1e-5


def test_seeds_train_on_devices_of_their_own_as_under_vmap(found):
    """The state is made there as well, and no seed sees rows of another."""
    assert len(found["seeds"]) == 6
    assert max(found["seeds"].values()) < 1e-5, found["seeds"]


def test_curvature_needs_no_further_all_reduces(found):
    gradient, always, sometimes = found["all-reduces"]
    assert always <= gradient, found["all-reduces"]
    assert sometimes <= 2 * gradient, found["all-reduces"]  # in two branches: one of them runs


@pytest.mark.parametrize("found", SLOW[1:], indirect=True)
def test_each_device_measures_some_of_its_own_rows(found):
    full, some = found["few rows"]["all-reduces"]
    assert some == full
    assert found["few rows"]["gap"] < 0.2  # of off-diagonal entries, which differ in sign
    assert found["few rows"]["spread"] > 0.01 or found["structures"] == "dense"


@pytest.mark.parametrize("found", SLOW[1:], indirect=True)
def test_a_program_of_one_of_several_devices_measures_few_rows(found):
    assert found["few rows on one of several"] > 1e-3


def test_momenta_are_sharded_like_their_parameters(found):
    assert found["state"]["momenta"] == 0


def test_factors_are_divided_over_the_mesh_and_stay_so(found):
    first, *later = found["state"]["shares"]
    assert len(first) == 4  # C and the levels of the rows of both layers
    assert set(first.values()) == {1 / 8}, first
    assert all(shares == first for shares in later)


@pytest.mark.slow
@pytest.mark.parametrize("found", ["dense"], indirect=True)
def test_sides_with_a_bias_are_divided_and_the_state_goes_on_on_any_mesh(found):
    told = found["sides of a bias"]
    for shares in told["shares"]:
        assert len(shares) == 3  # K and C, and the levels of rows
        assert set(shares.values()) == {1 / 8}, shares
    assert told["compiled"] == 1
    assert told["moved"] == 0
    assert all(told[how] < 1e-5 for how in ("same", "fewer", "one", "of one")), told


def test_products_of_data_that_devices_share_are_rejected_and_it_is_said_why(found):
    assert len(found["refusals"]) == 3
    for said in found["refusals"]:
        assert "the same on all devices along the axis 'model'" in said
        assert "shard_map(check_vma=True)" in said


@pytest.mark.parametrize("differs", [True, False], ids=["on each device", "equal"])
def test_what_a_loop_carries_differs_between_devices_where_its_end_does(differs):
    def local(p, x):
        turns = (x[0, 0] > 0).astype(int) if differs else 3
        start = 0, jnp.zeros((4, 6))
        _, h = jax.lax.while_loop(
            lambda carry: carry[0] < turns,
            lambda carry: (carry[0] + 1, 0.5 * carry[1] + 1.0),
            start,
        )
        return jax.lax.pmean(jnp.mean((h @ p["w"]) ** 2), "data")

    loss = jax.shard_map(
        local,
        mesh=AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    given = {"w": jnp.ones((6, 3))}, jnp.ones((32, 6))
    if differs:
        assert list(find_layers(loss, batch_size=32)(*given)) == ["w"]
    else:
        with pytest.raises(ValueError, match="the same on all devices along the axis 'data'"):
            find_layers(loss, batch_size=32)(*given)
