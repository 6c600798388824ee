"""The diagnostics: plain numbers that are what they are called, at no cost for others."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from singd_torch import SINGD


def model_and_step(**settings: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)),
        *(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.Flatten()),
    )
    optimizer = SINGD(model, **settings)  # type: ignore[arg-type]
    x, y = torch.randn(16, 5), torch.randint(10, (16,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, optimizer, step


def test_every_layer_has_every_quantity_as_a_plain_float() -> None:
    _, optimizer, step = model_and_step()
    step()
    optimizer.diagnostics()
    step()
    found = optimizer.diagnostics()
    quantities = {"agreement", "update"} | {
        f"{side}_{what}" for side in "KC" for what in ("norm", "step", "bounded", "damping")
    }
    names = [f"{layer}.weight" for layer in (0, 2, 4)]
    assert set(found) == {f"{name}/{quantity}" for name in names for quantity in quantities}
    assert all(type(value) is float for value in found.values())
    json.dumps(found)


def test_the_quantities_are_what_they_are_called() -> None:
    model, optimizer, step = model_and_step(structures=("dense", "dense"))
    optimizer.diagnostics()
    step()
    K = optimizer.state[model[0].weight]["K.matrix"].clone()
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().clone()
    step()
    found = {key.removeprefix("0.weight/"): v for key, v in optimizer.diagnostics().items()}
    entries = optimizer.state[model[0].weight]
    after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    assert found["K_norm"] == pytest.approx(float(entries["K.matrix"].norm()), rel=1e-5)
    assert found["update"] == pytest.approx(float((after - before).norm() / after.norm()), rel=1e-3)
    # damping is a share of t by default
    assert found["K_damping"] == pytest.approx(0.1 / 1.1, rel=1e-5)
    # K⁻¹ K' − I is −β m, and β ‖m‖ is bounded by ½
    m = torch.linalg.solve(K, entries["K.matrix"]) - torch.eye(6)
    assert min(found["K_step"], 0.5) == pytest.approx(float(m.norm()), rel=1e-3)
    assert found["K_bounded"] == float(found["K_step"] > 0.5)


def test_a_bound_that_cuts_is_told() -> None:
    _, optimizer, step = model_and_step(factor_bound=1e-3)
    optimizer.diagnostics()
    step()
    found = optimizer.diagnostics()
    assert found["0.weight/K_bounded"] == 1.0
    _, optimizer, step = model_and_step(factor_bound=1e3)
    optimizer.diagnostics()
    step()
    found = optimizer.diagnostics()
    assert found["0.weight/K_bounded"] == 0.0


def test_equal_gradients_agree_and_opposite_ones_do_not() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model, lr=0.0, structures=("dense", "dense"))
    optimizer.diagnostics()
    x, found = torch.randn(8, 3), []
    for sign in (1.0, 1.0, 1.0, -1.0):
        optimizer.zero_grad()
        (model(x).sum() * sign).backward()
        optimizer.step()
        found.append(optimizer.diagnostics()["weight/agreement"])
    assert found[:3] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert found[3] < 0.5


def test_nothing_is_recorded_for_who_does_not_ask() -> None:
    _, optimizer, step = model_and_step()
    assert optimizer.diagnostics() == {}  # before the first step there are no factors
    _, optimizer, step = model_and_step()
    step()
    assert all(stack.report is None for stack in optimizer._stepper.stacks)


def test_asking_changes_nothing() -> None:
    model, _, step = model_and_step()
    other, optimizer, other_step = model_and_step()
    for _ in range(3):
        step()
        optimizer.diagnostics()
        other_step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_kfac_has_the_norms_of_its_averages() -> None:
    _, optimizer, step = model_and_step(kfac=True)
    step()
    found = optimizer.diagnostics()
    assert {"0.weight/S_K_norm", "0.weight/S_C_norm", "0.weight/K_damping"} <= set(found)


def test_what_was_loaded_or_copied_is_told_before_a_step() -> None:
    _, optimizer, step = model_and_step()
    optimizer.diagnostics()
    step()
    known = optimizer.diagnostics()
    _, resumed, _ = model_and_step()
    resumed.load_state_dict(optimizer.state_dict())
    for other in (resumed, copy.deepcopy(optimizer)):
        found = other.diagnostics()
        assert {name.split("/")[0] for name in found} == {name.split("/")[0] for name in known}
        assert all(known[name] == value for name, value in found.items())
