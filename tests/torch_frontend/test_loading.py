"""What cannot be loaded is an error that names it and changes nothing; hooks are obeyed."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import (
    F32,
    Network,
    all_numbers,
    assert_equal,
    batches,
    deep_equal,
    through_a_file,
    train,
)
from torch import nn

from singd_core import rules
from singd_torch import SINGD


def saved_by(given: dict[str, Any], make: Callable[[], nn.Module] = Network) -> Any:
    model = make()
    optimizer = SINGD(model, **given)
    train(model, optimizer, batches(F32, 2))
    return through_a_file(optimizer.state_dict())


def wider() -> nn.Module:
    network = Network()
    network.hidden, network.out = nn.Linear(16, 9), nn.Linear(9, 3, bias=False)
    return network


def another_norm() -> nn.Module:
    network = Network()
    network.scale = nn.Parameter(torch.ones(8))
    return network


def deeper() -> nn.Module:
    network = Network()
    network.out = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    return network


DIAGONAL = {"structures": ("diagonal", "diagonal")}


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        (lambda: saved_by({}, wider), {}, r"'hidden\.weight' has shape \(9, 16\)"),
        (
            lambda: saved_by({}, another_norm),
            {},
            r"'exp_avg' of 'scale' has shape \(8,\) in the .*but \(\)",
        ),
        (lambda: saved_by({}, deeper), {}, r"\[11\] parameters in the checkpoint, here \[8\]"),
    ],
    ids=["another width", "another shape", "another depth"],
)
def test_load_error_names_the_mismatch_and_changes_nothing(
    saved: Callable[[], Any], live: dict[str, Any], message: str
) -> None:
    state = saved()
    model = Network()
    optimizer = SINGD(model, **live)
    train(model, optimizer, batches(F32, 2))
    twin, kept = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert deep_equal(optimizer.state_dict(), kept)
    # and goes on as if nothing had been tried
    other = SINGD(twin, **live)
    other.load_state_dict(kept)
    train(model, optimizer, batches(F32, 2))
    train(twin, other, batches(F32, 2))
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, other))


@pytest.mark.parametrize("by_model", [False, True])
def test_a_state_of_parameters_alone_is_not_the_state_of_a_model(by_model: bool) -> None:
    def started(by_model: bool) -> tuple[nn.Module, SINGD]:
        model = Network()
        return model, SINGD(model) if by_model else SINGD(model.named_parameters())

    model, optimizer = started(by_model)
    train(model, optimizer, batches(F32, 2))
    with pytest.raises(ValueError, match=r"has shape .* given the model and the other one param"):
        started(not by_model)[1].load_state_dict(optimizer.state_dict())


def test_settings_come_from_the_checkpoint_as_with_any_torch_optimizer() -> None:
    """Structures are settings of a group: the checkpoint's win, with factors that fit."""
    model = Network()
    optimizer = SINGD(model)
    optimizer.load_state_dict(saved_by({"lr": 0.07} | DIAGONAL))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.07
    assert tuple(group["structures"]) == ("diagonal", "diagonal")
    train(model, optimizer, batches(F32, 1))
    assert "K.diag" in optimizer.state[model.out.weight]


@pytest.mark.parametrize("missing", ["K.matrix", "averages.k"])
def test_missing_entry_is_named(missing: str) -> None:
    dense = {"structures": ("dense", "dense")}
    state = saved_by(dense)
    for entries in state["state"].values():
        entries.pop(missing, None)
    with pytest.raises(ValueError, match=rf"no '{missing}' for 'conv\.weight'"):
        SINGD(Network(), **dense).load_state_dict(state)


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = Network()
    with pytest.raises(
        ValueError, match="of another optimizer: it has no 'structures'; begin with a new"
    ):
        SINGD(model).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_a_checkpoint_may_be_older_than_a_setting() -> None:
    state = saved_by({"order": 1})
    del state["param_groups"][0]["order"]
    optimizer = SINGD(Network(), order=3)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["order"] == 3


def test_the_largest_rate_of_other_steps_is_not_kept() -> None:
    state = saved_by({"lr": 0.1})
    del state["param_groups"][0]["largest_lr"]
    model = Network()
    optimizer = SINGD(model, lr=1.0)
    train(model, optimizer, batches(F32, 1))
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(F32, 1))
    assert optimizer.param_groups[0]["largest_lr"] == 0.1


def test_steps_that_have_become_shorter_are_loaded() -> None:
    """Growth is a logarithm: unlike the sums beside it, it may be below 0."""
    state = saved_by({})
    entries = [e for e in state["state"].values() if "late.growth" in e]
    for e in entries:
        e["late.growth"].fill_(-1.5)
    optimizer = SINGD(Network())
    optimizer.load_state_dict(state)
    loaded = [e for e in optimizer.state_dict()["state"].values() if "late.growth" in e]
    assert len(loaded) == len(entries) > 0
    assert all((e["late.growth"] == -1.5).all() for e in loaded)


def test_momentum_of_another_shape_is_named() -> None:
    state = saved_by({})
    for entries in state["state"].values():
        if "momentum_buffer" in entries:
            entries["momentum_buffer"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of 'conv\.weight' has shape \(2, 2\)"):
        SINGD(Network()).load_state_dict(state)


def test_a_whole_part_may_be_left_out() -> None:
    """Who strips a checkpoint begins anew with what was stripped."""
    state = saved_by({})
    for entries in state["state"].values():
        for name in [n for n in entries if n.startswith(("momentum_buffer", "late.", "exp", "st"))]:
            del entries[name]
    model = Network()
    optimizer = SINGD(model)
    optimizer.load_state_dict(state)
    assert "K.matrix" in optimizer.state[model.hidden.weight]
    train(model, optimizer, batches(F32, 2))
    assert optimizer.skipped == 0


def test_counts_may_be_numbers_as_torch_once_saved_them() -> None:
    state = saved_by({})
    expected = copy.deepcopy(state)
    for entries in state["state"].values():
        if "step" in entries:
            entries["step"] = entries["step"].item()
    twins = [Network()]
    twins.append(copy.deepcopy(twins[0]))
    for model, saved in zip(twins, (state, expected), strict=True):
        optimizer = SINGD(model)
        optimizer.load_state_dict(saved)
        train(model, optimizer, batches(F32, 2))
    assert all(map(torch.equal, twins[0].parameters(), twins[1].parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_may_be_cast_as_a_whole(dtype: torch.dtype) -> None:
    state = saved_by({})
    for entries in state["state"].values():
        entries |= {name: value.to(dtype) for name, value in entries.items()}
    model = Network()
    optimizer = SINGD(model)
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(F32, 3))
    assert optimizer.skipped == 0
    assert {value.dtype for entries in optimizer.state.values() for value in entries.values()} == {
        torch.float32
    }
    assert optimizer.state[model.scale]["step"] == 5


@pytest.mark.parametrize("given", [None, torch.float32])
def test_factors_and_momenta_follow_a_model_in_another_dtype(given: torch.dtype | None) -> None:
    settings = {"preconditioner_dtype": (given, given), "momentum_dtype": given}
    model = Network().bfloat16()
    optimizer = SINGD(model, **settings)
    optimizer.load_state_dict(saved_by(settings))
    train(model, optimizer, batches(torch.bfloat16, 1))
    entries = optimizer.state[model.out.weight]
    found = {entries[name].dtype for name in ("K.matrix", "C.matrix", "momentum_buffer")}
    assert found == {given or torch.bfloat16}


# ---- hooks and keys of others ------------------------------------------------------------------


def by_name(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Torch's recipe for parameters in another order than in the checkpoint."""
    (saved,), adapted = state_dict["param_groups"], copy.deepcopy(optimizer.state_dict())
    (own,) = adapted["param_groups"]
    for name, index in zip(saved["param_names"], saved["params"], strict=True):
        to = own["params"][own["param_names"].index(name)]
        adapted["state"][to] = state_dict["state"][index]
    own |= {k: v for k, v in saved.items() if k not in ("params", "param_names")}
    return adapted


def test_a_hook_that_changes_what_is_loaded_is_obeyed() -> None:
    model, twin = Network(), Network()
    optimizer = SINGD(model, model.named_parameters())
    train(model, optimizer, batches(F32, 3))
    twin.load_state_dict(model.state_dict())
    other = SINGD(twin, reversed(list(twin.named_parameters())))
    seen: list[Any] = []
    other.register_load_state_dict_pre_hook(by_name)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append({n: dict(o.state[p]) for n, p in twin.named_parameters()})
    )
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal(all_numbers(model, optimizer), all_numbers(twin, other))
    assert all(seen[0][n].keys() == optimizer.state[p].keys() for n, p in model.named_parameters())
    train(model, optimizer, batches(F32, 2))
    train(twin, other, batches(F32, 2))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # the sum of the norms is in another order, and only that
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)


def test_what_a_hook_breaks_is_refused_and_changes_nothing() -> None:
    model = Network()
    optimizer = SINGD(model)
    train(model, optimizer, batches(F32, 2))
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["state"][0].popitem() and None)
    with pytest.raises(ValueError, match="the checkpoint has no"):
        optimizer.load_state_dict(copy.deepcopy(kept))
    assert deep_equal(optimizer.state_dict(), kept)


def test_a_second_state_is_loaded_as_the_first_was() -> None:
    model, again = Network(), SINGD(Network())
    optimizer = SINGD(model)
    for _ in range(2):
        train(model, optimizer, batches(F32, 1))
        saved = through_a_file(optimizer.state_dict())
        again.load_state_dict(copy.deepcopy(saved))
        assert deep_equal(again.state_dict(), saved)


def test_keys_of_others_are_carried_along_and_saved() -> None:
    """As `param_groups_layer_decay` of timm gives them, and schedules."""
    keys = {"name": "head", "lr_scale": 0.5, "initial_lr": 0.02, "alpha": 1, "dampening": 0.0}
    model, again = Network(), Network()
    optimizer = SINGD(model, [{"params": model.parameters(), **keys}])
    train(model, optimizer, batches(F32, 1))
    other = SINGD(again)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one in (optimizer, other):
        assert {key: one.param_groups[0][key] for key in keys} == keys


def test_a_schedule_goes_on_from_the_rate_of_a_checkpoint() -> None:
    """`last_epoch` asks for the `initial_lr` that the schedule wrote into the groups."""
    model = Network()
    optimizer = SINGD(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        train(model, optimizer, batches(F32, 1))
        schedule.step()
    again = Network()
    other = SINGD(again)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    resumed = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.5, last_epoch=2)
    assert resumed.get_last_lr() == [0.12 / 8]


@pytest.mark.filterwarnings("ignore:no rows of .* have been seen")
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_diagonal_factors_that_learned_from_rows_begin_anew_with_their_momenta(
    bias: bool, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3))

    def train(model: nn.Module, optimizer: SINGD, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with contextlib.nullcontext() if seen else optimizer.no_rows():
                model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()

    with monkeypatch.context() as before:
        before.setattr(rules.IKFAC, "wants_rows", rules.Rule.wants_rows)
        model = make()
        optimizer = SINGD(model, **DIAGONAL)
        train(model, optimizer, 3)
        saved = through_a_file(optimizer.state_dict())
    momentum = saved["state"][0]["momentum_buffer"].clone()
    assert (saved["state"][0]["averages.t_U"] > 0.0) == seen
    model = make()
    optimizer = SINGD(model, **DIAGONAL)
    optimizer.load_state_dict(saved)
    own = optimizer.state[model[0].weight]
    assert torch.equal(own["momentum_buffer"], momentum)
    train(model, optimizer, 2)
    assert "SINGD without rows" in repr(optimizer)
    own = optimizer.state[model[0].weight]
    assert own["K.diag"].shape == (8,)
    assert own["averages.t_U"] == 0.0
    assert own["averages.k"] == (2.0 if bias or seen else 5.0)
    assert (own["late.weights"].shape == (2,)) is bias
    assert optimizer.skipped == 0
