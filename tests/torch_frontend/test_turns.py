"""Layers and data that come in turns, and runs that go on from what was saved in between."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import cases
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from watched import Product

from singd_torch import SINGD

STEPS = 400
MISSES = "ignore:no rows of"


def _refreshes(optimizer: SINGD, weight: Tensor) -> float:
    return float(optimizer.state[weight]["averages.k"].sum())


@pytest.mark.parametrize("structures", ["dense", "diagonal"])
def test_networks_that_step_in_turns_have_the_same_share_of_the_refreshes(structures: str) -> None:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
    optimizer, x = SINGD(heads, structures=structures), torch.randn(16, 5)
    early = [0.0, 0.0]
    for step in range(STEPS):
        optimizer.zero_grad()
        (heads[step % 2](x) - 1.0).square().mean().backward()
        optimizer.step()
        if step == STEPS // 2 - 1:
            early = [_refreshes(optimizer, head.weight) for head in heads]
    late = [_refreshes(optimizer, h.weight) - k for h, k in zip(heads, early, strict=True)]
    assert min(late) >= 3.0
    assert abs(late[0] - late[1]) <= 2.0


class _Physics(nn.Module):
    """The loss has a derivative of the first layers, whose rows do not tell the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor, share: float) -> Tensor:
        x = x.requires_grad_()
        u = self.last(self.net(x))
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (u - x.sin()).square().mean() + share * (du - x.cos()).square().mean()


def _train(model: nn.Module, optimizer: SINGD, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.linspace(-1.0, 1.0, 16)[:, None]
        # other terms of the loss grow: layers part with their rows at a later step
        loss = model(x, min(1.0, 0.02 * step**2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _start() -> tuple[nn.Module, SINGD]:
    torch.manual_seed(1)
    model = _Physics()
    return model, SINGD(model)


def _loaded(saved: dict[str, Any]) -> tuple[nn.Module, SINGD]:
    model, optimizer = _start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("how", cases(["loaded", "copied", "rolled back"], fast=["rolled back"]))
@pytest.mark.filterwarnings(MISSES)
def test_a_run_that_goes_on_compares_rows_with_gradients_in_the_same_steps(how: str) -> None:
    expected = _train(*_start(), range(30))
    lost = False
    for at in range(12):
        model, optimizer = _start()
        _train(model, optimizer, range(at))
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if how == "loaded":
            model, optimizer = _loaded(saved)
        elif how == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        else:
            _train(model, optimizer, range(at, at + 9))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        assert _train(model, optimizer, range(at, 30)) == expected[at:], at
        lost = lost or "no rows" in str(optimizer) or "without rows" in str(optimizer)
    assert lost


def _one_step(model: nn.Linear, optimizer: SINGD, *, unseen: bool) -> None:
    optimizer.zero_grad()
    x = torch.randn(16, 5)
    loss = (model(x) - 1.0).square().mean()
    if unseen:
        loss = loss + (3.0 * Product.apply(torch.randn(16, 5), model.weight)).square().mean()
    loss.backward()
    optimizer.step()


@pytest.mark.filterwarnings(MISSES)
@pytest.mark.parametrize("T", [1, 3])
def test_rows_are_compared_with_gradients_after_1_2_4_8_refreshes(T: int) -> None:
    torch.manual_seed(0)
    found = []
    for at in range(17):
        model = nn.Linear(5, 3)
        optimizer = SINGD(model, T=T, growing_T=False)
        for step in range(at * T + 1):
            _one_step(model, optimizer, unseen=step == at * T)
        if "used where no call is seen" in str(optimizer):
            found.append(at)
    assert found == [0, 1, 2, 4, 8, 16]


@pytest.mark.filterwarnings(MISSES)
@pytest.mark.parametrize(
    "settings", [{}, {"T": 11, "growing_T": False}, {"recipe": "paper", "T": 11}]
)
@pytest.mark.parametrize("period", cases([2, 3, 5, 7], fast=[3]))
def test_a_use_that_nobody_sees_is_found_in_a_layer_of_every_nth_step(
    period: int, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
    optimizer = SINGD(heads, **settings)
    for step in range(500):
        optimizer.zero_grad()
        head = heads[0 if step % period == 1 else 1]
        loss = (head(torch.randn(16, 5)) - 1.0).square().mean()
        if step > 20:  # later than the first refreshes
            loss = loss + (3.0 * Product.apply(torch.randn(16, 5), head.weight)).square().mean()
        loss.backward()
        optimizer.step()
    assert str(optimizer).count("used where no call is seen") == 2


def _by_hand(model: nn.Linear, optimizer: SINGD) -> None:
    """A step whose gradient comes from no call of the layer."""
    optimizer.zero_grad()
    weight, bias = (p.detach().requires_grad_() for p in (model.weight, model.bias))
    loss = (torch.randn(16, 5) @ weight.mT + bias - 1.0).square().mean()
    model.weight.grad, model.bias.grad = torch.autograd.grad(loss, (weight, bias))
    optimizer.step()


@pytest.mark.filterwarnings(MISSES, "ignore:torch.distributed is disabled")
@pytest.mark.parametrize("how", ["copied", "saved", "by torch.distributed.checkpoint"])
def test_missed_refreshes_count_on_in_a_run_that_goes_on(how: str, tmp_path: Path) -> None:
    def begin() -> tuple[nn.Linear, SINGD]:
        torch.manual_seed(3)
        model = nn.Linear(5, 3)
        return model, SINGD(model)

    def train(model: nn.Linear, optimizer: SINGD, steps: range) -> Tensor:
        for step in steps:
            torch.manual_seed(step)
            if 3 <= step < 10:
                _by_hand(model, optimizer)
            else:  # rows come again, and then do not tell the gradient
                _one_step(model, optimizer, unseen=step > 12)
        return model.weight.detach().clone()

    expected = train(*begin(), range(24))
    # a state without rows has another form, which torch.distributed.checkpoint does not load anew
    last = () if how.startswith("by") else (13, 15)
    for at in (4, 5, 6, 8, 11, *last):
        model, optimizer = begin()
        train(model, optimizer, range(at))
        if how == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        elif how == "saved":
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = begin()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        else:
            dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)),
                     checkpoint_id=tmp_path / str(at))  # fmt: skip
            model, optimizer = begin()
            state = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=tmp_path / str(at))
            set_state_dict(
                model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"]
            )
        assert torch.equal(train(model, optimizer, range(at, 24)), expected), at


def _with_a_lost_layer() -> tuple[nn.Sequential, SINGD]:
    """Three layers, of which the middle one has lost its rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = SINGD(model)
    for _ in range(2):
        _step_of(model, optimizer, unseen=True)
    assert _lost(optimizer) == ["1.weight"]
    return model, optimizer


def _step_of(model: nn.Sequential, optimizer: SINGD, *, unseen: bool = False) -> None:
    optimizer.zero_grad()
    loss = model(torch.randn(16, 5)).square().mean()
    if unseen:
        loss = loss + (3.0 * Product.apply(torch.randn(16, 4), model[1].weight)).square().mean()
    loss.backward()
    optimizer.step()


def _lost(optimizer: SINGD) -> list[str]:
    lines = str(optimizer).splitlines()
    return [line.split()[0] for line in lines if "used where no call is seen" in line]


def _reordered(groups: list[Any]) -> None:
    groups[0]["params"] = [*groups[0]["params"][2:], *groups[0]["params"][:2]]


def _copied(groups: list[Any]) -> None:
    _reordered(groups)
    groups[0] = dict(groups[0])


@pytest.mark.filterwarnings(MISSES, "ignore:the model was changed")
@pytest.mark.parametrize("change", [_reordered, _copied])
def test_what_was_found_out_stays_with_its_parameter(change: Any) -> None:
    model, optimizer = _with_a_lost_layer()
    change(optimizer.param_groups)
    saved = optimizer.state_dict()["param_groups"][0]["layer_notes"]
    assert [name for _, name, _ in json.loads(saved)] == ["1.weight"]
    _step_of(model, optimizer)
    assert _lost(optimizer) == ["1.weight"]


@pytest.mark.filterwarnings(MISSES, "ignore:the model was changed")
def test_a_parameter_may_be_taken_out_and_put_back() -> None:
    model, optimizer = _with_a_lost_layer()
    params = optimizer.param_groups[0]["params"]
    taken = [params.pop(2), params.pop(2)]
    _step_of(model, optimizer)
    params += taken
    for _ in range(2):
        _step_of(model, optimizer)
    assert _lost(optimizer) == ["1.weight"]


@pytest.mark.filterwarnings(MISSES, "ignore:torch.distributed is disabled")
@pytest.mark.parametrize(  # nested checkpoints want the same groups
    ("flat", "groups"), [(False, 1), (True, 1), (True, 3)]
)
def test_a_checkpoint_by_names_goes_to_other_places(
    flat: bool, groups: int, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4, False), nn.Linear(4, 4, False), nn.Linear(4, 3, False))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [SINGD(models[0])]
    for _ in range(3):
        _step_of(models[0], optimizers[0], unseen=True)
    dcp.save(
        get_optimizer_state_dict(models[0], optimizers[0], options=options), checkpoint_id=tmp_path
    )
    models[1].load_state_dict(models[0].state_dict())
    params = [models[1][i].weight for i in (2, 0, 1)]
    given = params if groups == 1 else [{"params": [p]} for p in params]
    optimizers.append(SINGD(models[1], given))
    _step_of(models[1], optimizers[1], unseen=True)
    _step_of(models[1], optimizers[1], unseen=True)  # the state has the same entries
    state = get_optimizer_state_dict(models[1], optimizers[1], options=options)
    dcp.load(state, checkpoint_id=tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], state, options=options)
    assert _lost(optimizers[1]) == ["1.weight"]
    for _ in range(6):
        random = torch.get_rng_state()
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.set_rng_state(random)
            _step_of(model, optimizer)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings(MISSES)
def test_what_was_found_out_goes_to_a_model_of_other_names() -> None:
    """A state goes by places, as with any torch optimizer."""
    model, optimizer = _with_a_lost_layer()
    wrapped = SINGD(_Wrapper(copy.deepcopy(model)))
    wrapped.load_state_dict(optimizer.state_dict())
    assert _lost(wrapped) == ["module.1.weight"]


@pytest.mark.filterwarnings(MISSES)
def test_two_models_with_the_same_names_keep_what_was_found_out() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))) for _ in range(2)]
    given = [{"params": list(model.named_parameters())} for model in models]
    optimizer = SINGD(models[1], given)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(16, 4)
        unseen = (3.0 * Product.apply(torch.randn(16, 4), models[1][1].weight)).square().mean()
        (models[0](x).square().mean() + models[1](x).square().mean() + unseen).backward()
        optimizer.step()
    assert _lost(optimizer) == ["1.weight"]
    before = str(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert str(optimizer) == before


@pytest.mark.filterwarnings(MISSES, "ignore:the gradients? of .* NaN")
@pytest.mark.parametrize("how", ["copied", "saved"])
def test_steps_that_change_nothing_count_in_a_run_that_goes_on(how: str) -> None:
    def train(model: nn.Linear, optimizer: SINGD, steps: range) -> Tensor:
        for step in steps:
            torch.manual_seed(step)
            if step == 2:
                optimizer.zero_grad()
                (model(torch.randn(16, 5)).sum() * torch.nan).backward()
                optimizer.step()
            else:
                _one_step(model, optimizer, unseen=step > 4)
        return model.weight.detach().clone()

    def begin() -> tuple[nn.Linear, SINGD]:
        torch.manual_seed(3)
        model = nn.Linear(5, 3)
        return model, SINGD(model)

    expected = train(*begin(), range(16))
    for at in (3, 4, 5):
        model, optimizer = begin()
        train(model, optimizer, range(at))
        if how == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        else:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = begin()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        assert torch.equal(train(model, optimizer, range(at, 16)), expected), at


class _ByFunction(nn.Module):
    """Experts, and a layer whose weight is handed to a function: modes see them, and no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.linear = nn.Parameter(torch.randn(2, 5, 5) / 2), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.bmm(x.expand(2, *x.shape), self.stack)).sum(0)
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


@pytest.mark.filterwarnings("ignore:the gradients? of .* NaN")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("first", ["NaN", "no gradient"])
def test_a_first_step_that_changes_nothing_is_none(first: str, saved: bool) -> None:
    torch.manual_seed(3)
    models = [_ByFunction()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [SINGD(model, warmup=0) for model in models]
    if first == "NaN":
        (models[0](torch.randn(9, 5)).sum() * torch.nan).backward()
    optimizers[0].step()
    if saved:
        state = copy.deepcopy(optimizers[0].state_dict())
        optimizers[0] = SINGD(models[0], warmup=0)
        optimizers[0].load_state_dict(state)
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(4)
        optimizer.zero_grad()
        (model(torch.randn(9, 5)) - 1.0).square().sum().backward()
        optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
        assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()


@pytest.mark.filterwarnings("ignore:no rows of .* have (been seen|come)")
@pytest.mark.parametrize("how", ["zero_grad", "model.zero_grad", "none between"])
def test_rows_of_the_last_of_several_tasks_do_not_stand_for_all(how: str) -> None:
    """Their gradients are joined by hand. A batch that is left out is no task."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    optimizer = SINGD(model)
    for _ in range(12):
        joined = [torch.zeros_like(p) for p in model.parameters()]
        for _ in range(2):
            if how == "model.zero_grad":
                model.zero_grad()
            else:
                optimizer.zero_grad()
            (model(torch.randn(9, 5)) - 1.0).square().mean().backward()
            for p, own in zip(model.parameters(), joined, strict=True):
                own += p.grad
        if how != "none between":
            for p, own in zip(model.parameters(), joined, strict=True):
                p.grad = own
        optimizer.step()
    by_rows = [optimizer.state[p]["averages.t_U"].any() for p in model.parameters() if p.ndim > 1]
    assert any(by_rows) is (how == "none between")
