"""What torch's tests ask of the state of an optimizer, of its hooks and of averages."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression import CONFIGS, Regression, closure_of, every, made, same, stepped, values
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from singd_torch import SINGD

# ---- state -------------------------------------------------------------------------------------


@every
def test_a_loaded_optimizer_goes_on_alike(config: str, layer: bool) -> None:
    model, optimizer = stepped(config, layer)
    twin = Regression(layer)
    twin.load_state_dict(model.state_dict())
    other = SINGD(twin, **copy.deepcopy(CONFIGS[config]))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer))
        other.step(closure_of(twin, other))
        assert same(values(model), values(twin))
    assert same(saved, kept)
    assert same(optimizer.state_dict(), other.state_dict())


def test_groups_that_are_repeated_are_saved_alike() -> None:
    _, optimizer = stepped("default", layer=True)
    saved = optimizer.state_dict()["param_groups"]
    optimizer.param_groups.extend(optimizer.param_groups)
    assert same(optimizer.state_dict()["param_groups"][-1], saved[-1])


@every
def test_a_state_dict_is_what_weights_only_loads(config: str, layer: bool, tmp_path: Any) -> None:
    _, optimizer = stepped(config, layer)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), optimizer.state_dict())


@every
def test_copies_and_pickles_have_what_is_public(config: str, layer: bool) -> None:
    _, optimizer = stepped(config, layer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, twin)]
        assert public[0] == public[1]
        assert same(twin.state_dict(), optimizer.state_dict())
        assert same(twin.defaults, optimizer.defaults | {"differentiable": False})  # torch's own


def test_state_is_there_after_a_step() -> None:
    for config in CONFIGS:
        _, optimizer = stepped(config, layer=False, n=1)
        assert all(len(entries) > 0 for entries in optimizer.state.values())
        group = optimizer.param_groups[0]
        keeps_none = group["normalized"] and group["momentum"] == 0.0  # of a bias
        assert len(optimizer.state) == 2 - keeps_none


def test_names_are_kept_and_do_not_change_what_is_loaded() -> None:
    named, plain = Regression(layer=True), Regression(layer=True)
    a, b = SINGD(named, named.named_parameters()), SINGD(plain)
    a.step(closure_of(named, a))
    assert a.param_groups[0]["param_names"] == ["layer.weight", "layer.bias"]
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["param_names"] == ["layer.weight", "layer.bias"]
    plain.load_state_dict(named.state_dict())
    a.step(closure_of(named, a))
    b.step(closure_of(plain, b))
    assert same(values(named), values(plain))
    with pytest.raises(ValueError, match="with/without names"):
        a.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# ---- hooks -------------------------------------------------------------------------------------


def test_hooks_are_called_in_order() -> None:
    model, optimizer = made("default", layer=True)
    calls: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_: calls.append(text)

    handles = [
        register_optimizer_step_pre_hook(note("before all")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("after all")),
    ]
    optimizer.step(closure_of(model, optimizer))
    assert calls == ["before all", "before", "after", "after all"]
    for handle in handles:
        handle.remove()
    optimizer.step(closure_of(model, optimizer))
    assert len(calls) == 4


def test_a_hook_may_change_what_a_step_is_called_with() -> None:
    model, optimizer = made("default", layer=True)
    closure = closure_of(model, optimizer)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    before = values(model)
    assert optimizer.step() is not None
    assert not same(values(model), before)


def test_hooks_of_saving_change_what_is_saved() -> None:
    _, optimizer = stepped("default", layer=True)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, saved: saved["state"].clear())
    saved = optimizer.state_dict()
    assert calls == ["before"]
    assert not any(saved["state"].values())


def test_hooks_of_loading_change_what_is_loaded() -> None:
    model, optimizer = stepped("default", layer=True)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def rate(value: float) -> Callable[..., Any]:
        def hook(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            calls.append(value)
            changed = copy.deepcopy(state_dict)
            changed["param_groups"][0]["lr"] = value
            return changed

        return hook

    optimizer.register_load_state_dict_pre_hook(rate(0.002))
    optimizer.register_load_state_dict_pre_hook(rate(0.003), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: o.param_groups[0].update(lr=0.5))
    seen: list[float] = []
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.param_groups[0]["lr"]), prepend=True
    )
    optimizer.load_state_dict(saved)
    assert calls == [0.003, 0.002]
    assert seen == [0.002]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] == 0.12
    optimizer.step(closure_of(model, optimizer))


# ---- averages of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averages_of_the_weights_follow(average: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SINGD(model)
    averaged = AveragedModel(model, multi_avg_fn=average)
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    x, y = torch.randn(32, 5), torch.randint(3, (32,))
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
        seen.append(model[0].weight.detach().clone())
    update_bn([x], averaged)
    expected = torch.stack(seen).mean(0)
    if average is not None:
        expected = seen[0]
        for weight in seen[1:]:
            expected = expected.lerp(weight, 0.1)
    torch.testing.assert_close(averaged.module[0].weight, expected)
    assert optimizer.skipped == 0
