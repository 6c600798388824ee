"""Groups, settings and a state that a script gives to an optimizer in place of its own."""

import copy
import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_network import assert_same, everything, network, step
from torch import nn

from singd_torch import SINGD
from singd_torch.tensors import pieces

X = torch.randn(9, 6)


def two_groups(model: Any) -> SINGD:
    return SINGD(
        model,
        [
            {"params": model[:4].parameters(), "structures": "dense", "lr": 0.1},
            {"params": model[4:].parameters(), "structures": "diagonal", "lr": 0.2},
        ],
    )


def other_list(optimizer: Any) -> None:
    optimizer.param_groups = list(optimizer.param_groups)


def copies(optimizer: Any) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def one_copy(optimizer: Any) -> None:
    optimizer.param_groups[1] = dict(optimizer.param_groups[1])


def in_reverse(optimizer: Any) -> None:
    optimizer.param_groups.reverse()


@pytest.mark.parametrize("change", [other_list, copies, one_copy, in_reverse])
def test_groups_may_be_replaced_by_their_copies(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = two_groups(model), two_groups(twin)
    for _ in range(12):
        change(optimizer)
        for group in optimizer.param_groups + other.param_groups:
            group["lr"] *= 0.9
        step(model, optimizer, X)
        step(twin, other, X)
    assert_same(everything(model, optimizer), everything(twin, other))
    assert [group["steps"] for group in optimizer.param_groups] == [12, 12]


def test_a_group_that_is_left_out_is_not_trained() -> None:
    model: Any = network()
    optimizer = two_groups(model)
    step(model, optimizer, X)
    optimizer.param_groups = [g for g in optimizer.param_groups if g["lr"] != 0.1]
    before = copy.deepcopy(model)
    for _ in range(2):
        step(model, optimizer, X)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) is (name[0] < "4"), name


def test_a_state_that_is_saved_keeps_what_was_taken_out_of_the_groups() -> None:
    model = network()
    optimizer = SINGD(model)
    step(model, optimizer, X)
    before = everything(model, optimizer)
    params = optimizer.param_groups[0]["params"]
    taken = [params.pop(), params.pop()]
    optimizer.state_dict()
    params += reversed(taken)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("name", ["momentum", "fallback_lr", "base_lr", "largest_lr"])
def test_what_a_group_lacks_is_named_and_changes_nothing(name: str) -> None:
    model = network()
    optimizer = two_groups(model)
    step(model, optimizer, X)
    before = everything(model, optimizer)
    del optimizer.param_groups[1][name]
    with pytest.raises(ValueError, match=f"parameter group 1 has no '{name}': optimizer.add_param"):
        step(model, optimizer, X)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("how", ["another", "emptied", "entries emptied"])
def test_a_state_that_is_reset_begins_anew_with_the_next_rows(how: str) -> None:
    model: Any = network()
    optimizer: Any = SINGD(model)
    for _ in range(124):  # far from a refresh
        step(model, optimizer, X)
    if how == "another":
        optimizer.state = defaultdict(dict)
    elif how == "emptied":
        optimizer.state.clear()
    else:
        for own in optimizer.state.values():
            own.clear()
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    weights = [(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(torch.equal(p, q) for p, q in weights if p.ndim > 1)  # no momentum is left
    for _ in range(2):
        step(model, optimizer, X)
    layers = [p for p in model.parameters() if p.ndim > 1]
    assert all(optimizer.state[p]["averages.k"].eq(1.0).all() for p in layers)
    again = network()
    SINGD(again).load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("given", [{}, {"capturable": True}, {"compile_step": True}])
@pytest.mark.parametrize("structures", ["dense", "diagonal"])
def test_tensors_of_the_state_may_get_other_memory(
    structures: str, given: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scripts move a state to another device: `v.data = v.data.to(device)`."""
    if given:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    if given == {"compile_step": True}:
        given = {"compile_step": {"backend": "eager"}}  # type: ignore[dict-item]
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]).double()
    twin = copy.deepcopy(model)
    optimizer = SINGD(model, structures=structures, **given)
    other = SINGD(twin, structures=structures, **given)
    for t in range(30):
        x = torch.sin(torch.arange(54.0, dtype=torch.float64).view(9, 6) + t)
        for one, own in ((model, optimizer), (twin, other)):
            step(one, own, x)
        if t in (12, 20):  # a checkpoint has what is learned
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if t % 7 == 5:
            for v in [v for own in optimizer.state.values() for v in own.values()]:
                v.data = v.data.clone()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


NUMBERS = {
    "lr": np.float32(0.1),
    "momentum": np.float32(0.5),
    "T": np.int64(7),
    "rows": np.int64(64),
    "fallback_lr": np.float64(0.02),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("where", ["argument", "group", "later"])
def test_numbers_of_numpy_are_numbers(name: str, where: str) -> None:
    steps: list[Any] = []
    for value in (NUMBERS[name], NUMBERS[name].item()):
        torch.manual_seed(0)
        model, given = network(), {name: value}
        if where == "group":
            optimizer = SINGD(model, [{"params": model.parameters(), **given}])
        else:
            optimizer = SINGD(model, **(given if where == "argument" else {}))
        if where == "later":
            optimizer.param_groups[0][name] = value
        for _ in range(2):
            step(model, optimizer, X)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        SINGD(model).load_state_dict(torch.load(file, weights_only=True))
        steps.append(everything(model, optimizer))
    assert_same(*steps)


@pytest.mark.parametrize("how", ["another", "entries"])
def test_a_state_that_is_given_by_hand_is_gone_on_from(how: str) -> None:
    model, given = network(), {"T": 4, "growing_T": False}
    optimizer = SINGD(model, **given)
    for _ in range(9):  # the next refresh is not in the next step
        step(model, optimizer, X)
    twin = copy.deepcopy(model)
    other, found = SINGD(twin, **given), defaultdict(dict)  # type: ignore[var-annotated]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        found[q] = {name: value.clone() for name, value in optimizer.state[p].items()}
    if how == "another":
        other.state = found
    else:
        other.state.update(found)
    for name in ("steps", "largest_lr"):
        other.param_groups[0][name] = optimizer.param_groups[0][name]
    for _ in range(6):
        step(model, optimizer, X)
        step(twin, other, X)
    assert_same(everything(model, optimizer), everything(twin, other))


def test_a_state_that_is_put_aside_is_not_written_to() -> None:
    model = network()
    optimizer = SINGD(model)
    for _ in range(3):
        step(model, optimizer, X)
    aside, before = optimizer.state, everything(model, optimizer)
    optimizer.state = defaultdict(dict)
    for p, own in aside.items():
        optimizer.state[p] = {name: value.clone() for name, value in own.items()}
    step(model, optimizer, X)
    optimizer.state = aside
    after = everything(model, optimizer)
    assert_same(*({k: v for k, v in found.items() if " | " in k} for found in (before, after)))


@pytest.mark.parametrize("samples", [9, 9000], ids=["waiting", "measured at once"])
def test_a_step_under_autocast_is_the_step(samples: int) -> None:
    model, x = network(), torch.randn(samples, 6)
    twin = copy.deepcopy(model)
    optimizers = [SINGD(one, rows=torch.inf) for one in (model, twin)]
    for _ in range(4):
        for own, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(own(x), torch.arange(samples) % 3)
                if own is twin:
                    loss.backward()
                    optimizer.step()
            if own is model:
                loss.backward()
                optimizer.step()
    assert_same(everything(model, optimizers[0]), everything(twin, optimizers[1]))
