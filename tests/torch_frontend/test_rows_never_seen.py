"""Layers whose rows nobody sees learn from their gradients, until rows are seen."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import singd_torch.optimizer
from singd_torch import SINGD

pytestmark = pytest.mark.filterwarnings("ignore:no rows of .* have been seen")

# Relative to the largest entry, float64: ten steps that divide by small numbers here and there.
CLOSE = 1e-11


def network() -> nn.Module:
    """Equal layers that step as one, stacked ones, a table, and matrices in groups."""
    return nn.Sequential(
        nn.Embedding(7, 8),
        nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
        nn.Conv1d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (16, 6)), torch.randn(16, 3, dtype=torch.float64)


def train(
    model: nn.Module, optimizer: SINGD, data: tuple[Tensor, Tensor], n: int, *, seen: bool
) -> list[float]:
    """The losses of n steps. Their rows are seen or not."""
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = (model(data[0]) - data[1]).square().mean()
        if seen:
            loss.backward()
        else:
            with optimizer.no_rows():
                loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rules(optimizer: SINGD) -> set[str]:
    """What the table says of matrices."""
    lines = [line.split("  ") for line in repr(optimizer).splitlines()[2:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {rule for _, shape, rule, *_ in cells if "×" in shape}


def all_of(model: nn.Module, optimizer: SINGD) -> dict[Any, Tensor]:
    found: dict[Any, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {(name, key): a.clone() for key, a in optimizer.state[p].items()}
    return found


def assert_equal(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert torch.equal(found[name], a), name


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_are_those_of_the_matrix_alone(compiled: bool) -> None:
    """The matrix of a layer has its bias as its last column."""
    layer = nn.Linear(5, 4).double()
    alone = nn.Parameter(torch.cat([layer.weight, layer.bias[:, None]], 1).detach())
    ours = SINGD(layer, compile_step={"backend": "eager"} if compiled else False)
    theirs = SINGD([alone])
    for _ in range(24):  # the third gap is of two steps
        alone.grad = torch.randn_like(alone)
        layer.weight.grad, layer.bias.grad = alone.grad[:, :-1], alone.grad[:, -1]
        ours.step()
        theirs.step()
    found = torch.cat([layer.weight, layer.bias[:, None]], 1)
    assert (found - alone).abs().max() <= CLOSE * alone.abs().max()


def test_they_learn_and_the_table_and_a_warning_say_so() -> None:
    model, data = network(), batch()
    optimizer = SINGD(model)
    twin, other = copy.deepcopy(model), batch()
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01)
    assert rules(optimizer) == {"SINGD"}
    with pytest.warns(UserWarning, match="Until rows are seen, gradients alone refresh the"):
        losses = train(model, optimizer, data, 30, seen=False)
    for _ in range(30):
        adamw.zero_grad()
        loss = (twin(data[0]) - data[1]).square().mean()
        loss.backward()
        adamw.step()
    assert losses[-1] < loss.item()
    assert rules(optimizer) == {"SINGD without rows"}
    assert "no call of its module was seen so far" in repr(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        train(model, optimizer, other, 2, seen=False)


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_a_backward_before_the_optimizer_was_built_is_warned_about_once(recipe: str) -> None:
    model, data = network(), batch()
    (model(data[0]) - data[1]).square().mean().backward()
    optimizer = SINGD(model, recipe=recipe)
    several = r"no rows of '\S+', '\S+' and \d+ more have been seen\. Until rows"
    with pytest.warns(UserWarning, match=several) as caught:
        optimizer.step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        optimizer.step()


def test_rows_take_over_when_they_are_seen() -> None:
    model, data = network(), batch()
    optimizer = SINGD(model, T=2, growing_T=False)
    losses = train(model, optimizer, data, 20, seen=False)
    losses += train(model, optimizer, data, 20, seen=True)
    assert rules(optimizer) == {"SINGD"}
    assert max(losses[20:]) < losses[0]
    assert losses[-1] < 0.5 * losses[19]
    for p in model.parameters():
        if "K.matrix" in optimizer.state[p]:
            assert (optimizer.state[p]["averages.t_U"] > 0.0).all()
            assert optimizer.state[p]["averages.k"].unique().item() == 10.0
    other = copy.deepcopy(model)
    resumed = SINGD(other, T=2, growing_T=False)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, own in ((model, optimizer), (other, resumed)):
        train(net, own, data, 6, seen=True)
    assert_equal(all_of(other, resumed), all_of(model, optimizer))


def test_some_of_equal_layers_are_seen() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))).double()
    optimizer = SINGD(model)
    x = torch.randn(9, 5, dtype=torch.float64)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        for i, layer in enumerate(model):
            with optimizer.no_rows():
                if i != 1 and not (i == 2 and step > 2):
                    gradients = torch.autograd.grad(loss, layer.parameters(), retain_graph=True)
                    layer.weight.grad, layer.bias.grad = gradients
        loss.backward(inputs=[*model[1].parameters(), *(model[2].parameters() if step > 2 else ())])
        optimizer.step()
    lines = repr(optimizer).splitlines()[2:]
    found = {line.split()[0]: "without rows" in line for line in lines}
    assert found == {"0.weight": True, "1.weight": False, "2.weight": False, "3.weight": True}
    assert optimizer.skipped == 0


@pytest.mark.parametrize("later", [False, True], ids=["without rows", "with rows"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_checkpoint_goes_on_where_it_stopped(steps: int, later: bool) -> None:
    model, data = network(), batch()
    optimizer = SINGD(model)
    train(model, optimizer, data, steps, seen=False)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(weights)
    resumed = SINGD(other)
    resumed.load_state_dict(state)
    assert repr(resumed) == repr(optimizer)
    for net, own in ((model, optimizer), (other, resumed)):
        train(net, own, data, 3, seen=False)
        train(net, own, data, 9, seen=later)
    assert_equal(all_of(other, resumed), all_of(model, optimizer))
    assert repr(resumed) == repr(optimizer)


def test_adamw_goes_on_from_a_checkpoint() -> None:
    """With the recipe "paper" it trains layers until their rows are seen."""
    model = nn.Linear(4, 3)
    optimizer = SINGD(model, recipe="paper")
    for p in model.parameters():
        p.grad = torch.sin(3.0 * p.detach()) + 0.1
    optimizer.step()
    twin = copy.deepcopy(model)
    other = SINGD(twin, recipe="paper")
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p]["step"] == other.state[q]["step"] == 2
        assert torch.equal(p, q)


def test_what_had_rows_resumes_with_rows_where_none_were_seen() -> None:
    """A checkpoint of the one, loaded into the other, tells which it is."""
    model, data = network(), batch()
    optimizer, twin = SINGD(model), copy.deepcopy(model)
    train(model, optimizer, data, 3, seen=True)
    other = SINGD(twin)
    train(twin, other, data, 3, seen=False)
    without = copy.deepcopy(other.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert rules(other) == {"SINGD"}
    optimizer.load_state_dict(without)
    assert rules(optimizer) == {"SINGD without rows"}


def test_a_copy_trains_its_own_model() -> None:
    model, data = network(), batch()
    optimizer = SINGD(model)
    train(model, optimizer, data, 3, seen=False)
    twin, copied = copy.deepcopy((model, optimizer))
    for seen in (False, True):
        expected = train(model, optimizer, data, 4, seen=seen)
        assert train(twin, copied, data, 4, seen=seen) == expected


@pytest.mark.parametrize("where", ["host", "accelerator"])
def test_first_rows_that_are_not_finite_change_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "accelerator":
        monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    model, data = network(), batch()
    optimizer = SINGD(model)
    train(model, optimizer, data, 3, seen=False)
    before = all_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN or infinite")
        train(model, optimizer, (data[0], data[1] * torch.nan), 1, seen=True)
        assert optimizer.skipped == 1
    assert_equal(all_of(model, optimizer), before)
    assert rules(optimizer) == {"SINGD without rows"}
    train(model, optimizer, data, 8, seen=True)
    assert rules(optimizer) == {"SINGD"}


def test_steps_of_an_accelerator_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    for net, own in ((model, optimizer), (twin, other)):
        train(net, own, data, 4, seen=False)
        train(net, own, data, 4, seen=True)
        monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [{"recipe": "paper"}, {"kfac": True}], ids=str)
def test_adamw_trains_them_as_the_paper_does(given: dict[str, Any]) -> None:
    model = nn.Linear(4, 3).double()
    optimizer = SINGD(model, **given)
    x = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Until rows are seen, AdamW trains the weights"):
        train(model, optimizer, x, 2, seen=False)
    assert "exp_avg" in optimizer.state[model.weight]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 6).to(dtype)
    optimizer = SINGD(layer, lr=0.5, warmup=0)
    for _ in range(30):
        layer.weight.grad, layer.bias.grad = layer.weight.detach().clone(), layer.bias.detach() * 0
        optimizer.step()
    assert optimizer.skipped == 0
    assert layer.weight.float().square().mean() < 0.1
