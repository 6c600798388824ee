"""Weights without rows whose biases are known by names: steps without the mean of inputs."""

import copy
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import recent
import torch
from torch import Tensor, nn

import singd_torch.tensors.pieces
from singd_core import Optimizer
from singd_torch import SINGD

# Relative to the largest entry, float64: ten steps that divide by small numbers here and there.
CLOSE = 1e-10


def network(*, twice: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.Linear(6, 6), nn.Tanh()] * (2 if twice else 1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), *copy.deepcopy(middle), nn.Linear(6, 3)
    ).double()


def batch(n: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=draw) + 2.0
    return x, torch.randn(n, 3, dtype=torch.float64, generator=draw)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """Steps on batches of their own, and the losses before them."""
    losses = []
    dtype = next(model.parameters()).dtype
    for i in steps:
        x, y = (t.to(dtype) for t in batch(seed=i))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model: nn.Module, twin: nn.Module, close: float = CLOSE) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=close, atol=close)


def rules(optimizer: SINGD) -> dict[str, str]:
    """What the table says of each parameter."""
    lines = [line.split("  ") for line in repr(optimizer).splitlines()[2:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {name: rule for name, _, rule, *_ in cells}


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[recent.COMPILES, pytest.mark.slow])]
)
@pytest.mark.parametrize("where", ["host", "accelerator"])
def test_steps_are_those_of_the_pure_optimizer(
    compiled: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal ones step as one, and do not show it."""
    if where == "accelerator":
        monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    shapes = {
        **dict.fromkeys("ab", ((6, 4), (6,))),
        "kernel": ((4, 3, 2, 2), (4,)),
        "stack": ((2, 3, 5), (2, 3)),
        "first": ((5, 1), (5,)),  # a single input
    }
    params = {
        f"{name}.{part}": nn.Parameter(torch.randn(shape, dtype=torch.float64))
        for name, both in shapes.items()
        for part, shape in zip(("weight", "bias"), both, strict=True)
    }
    how = {"backend": "eager"} if compiled else False
    ours, pure = SINGD(params.items(), compile_step=how), Optimizer({})
    theirs: Any = {
        name: tuple(params[f"{name}.{part}"].detach().numpy().copy() for part in ("weight", "bias"))
        for name in shapes
    }
    state = pure.init(theirs)
    for _ in range(14):
        for p in params.values():
            p.grad = torch.randn_like(p)
        grads = {
            name: tuple(params[f"{name}.{part}"].grad.numpy() for part in ("weight", "bias"))  # type: ignore[union-attr]
            for name in shapes
        }
        updates, state = pure.update(grads, state, theirs)
        theirs = pure.apply(theirs, updates)
        ours.step()
    assert int(ours.skipped) == state.skipped == 0
    for name, both in theirs.items():
        for part, expected in zip(("weight", "bias"), both, strict=True):
            size = float(np.max(np.abs(expected)))
            found = params[f"{name}.{part}"].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * size, err_msg=name)


def test_the_table_shows_pairs() -> None:
    assert rules(SINGD(network().named_parameters())) == {
        "0.weight + bias": "SINGD without rows",
        "2.weight + bias": "SINGD without rows",
        "4.weight + bias": "SINGD without rows",
    }
    lstm = nn.LSTM(3, 5, bidirectional=True)
    assert all(" + bias_" in name for name in rules(SINGD(lstm.named_parameters())))
    assert all(" + bias_" in name for name in rules(SINGD(lstm)))
    assert len(rules(SINGD(lstm))) == 4
    narrow = nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 1))
    assert rules(SINGD(narrow.named_parameters())) == {
        "0.weight + bias": "SINGD without rows",
        "1.weight": "AdamW",
        "1.bias": "AdamW",
    }


def test_parameters_without_names_have_no_pairs() -> None:
    assert set(rules(SINGD(network().parameters())).values()) == {"SINGD without rows", "AdamW"}


def test_names_of_several_models_may_be_equal() -> None:
    """A bias is in the group of its weight then."""
    one, two = nn.Linear(4, 6).double(), nn.Linear(4, 6).double()
    groups = [{"params": list(model.named_parameters())} for model in (one, two)]
    optimizer = SINGD(groups)
    assert [layer.bias for layer in optimizer._layers] == [one.bias, two.bias]
    apart = [
        {"params": [("weight", one.weight), ("weight_2", two.weight)]},
        {"params": [("bias", one.bias), ("bias_2", two.bias)]},
    ]
    assert [layer.bias for layer in SINGD(apart)._layers] == [one.bias, two.bias]
    mixed = [
        {"params": [("weight", one.weight)]},
        {"params": [("weight", two.weight), ("bias", two.bias)]},
        {"params": [("bias", one.bias)]},
    ]
    assert [layer.bias for layer in SINGD(mixed)._layers] == [None, two.bias]


def in_two_groups(model: nn.Module, **of_biases: Any) -> SINGD:
    named = list(model.named_parameters())
    weights = [(n, p) for n, p in named if p.ndim > 1]
    biases = [(n, p) for n, p in named if p.ndim == 1]
    return SINGD([{"params": weights}, {"params": biases, **of_biases}])


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[recent.COMPILES, pytest.mark.slow])]
)
def test_biases_in_a_group_of_their_own_are_the_same(compiled: bool) -> None:
    """As of those who let no bias decay."""
    model, twin = network(), network()
    how = {"backend": "eager"} if compiled else False
    train(model, SINGD(model.named_parameters(), compile_step=how), range(20))
    train(twin, in_two_groups(twin, weight_decay=0.0), range(20))
    assert_same(model, twin, 1e-9)


@pytest.mark.parametrize("where", ["host", "accelerator"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_a_bias_with_a_rate_of_its_own(
    share: float, as_tensor: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes up for the mean has the rate of the weight; a bias that rests makes up for none.

    So a shift of the inputs changes no step of W, or the first one does as without a bias.
    """
    if where == "accelerator":
        monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    found = []
    for own in (share, 1.0):
        model = network()
        optimizer = in_two_groups(model, lr=torch.tensor(0.1 * own) if as_tensor else 0.1 * own)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1) if as_tensor else 0.1
        before = values(model)
        train(model, optimizer, range(1))
        found.append([new - old for new, old in zip(values(model), before, strict=True)])
        mean = optimizer.state[model[0].weight]["inputs.mean"]
        found[-1].append(found[-1][0] @ mean)  # ΔW μ
    slow, same = found
    if share == 0.0:
        assert not slow[1].any()
        assert not torch.allclose(slow[0], same[0])  # the first step is of G itself
        return
    torch.testing.assert_close(slow[0], same[0])
    torch.testing.assert_close(slow[1] + slow[-1], share * (same[1] + same[-1]))


def test_a_frozen_bias_and_a_frozen_weight() -> None:
    """As in fine-tuning of biases alone, by AdamW then, and the other way round."""
    for part in ("weight", "bias"):
        model = network()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith(part))
        before = values(model)
        losses = train(model, SINGD(model.named_parameters()), [0] * 40)
        assert losses[-1] < losses[0]
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            assert torch.equal(p, old) == name.endswith(part)


@pytest.mark.parametrize("given", [{}, {"capturable": True}, {"structures": "diagonal"}], ids=str)
def test_a_checkpoint_goes_on_where_it_stopped(given: dict[str, Any]) -> None:
    model = network(twice=True)
    optimizer = SINGD(model.named_parameters(), **given)
    train(model, optimizer, range(12))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    twin = network(twice=True)
    other = SINGD(twin.named_parameters(), **given)
    of_model, of_optimizer = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    twin.load_state_dict(of_model)
    other.load_state_dict(of_optimizer)
    train(model, optimizer, range(12, 20))
    train(twin, other, range(12, 20))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    third = copy.deepcopy(other)
    assert [*third.state_dict()["state"]] == [*other.state_dict()["state"]]


def test_a_state_of_before_goes_on_with_a_mean_that_begins() -> None:
    """AdamW trained the biases then: parameters without names do as it was."""
    model = network()
    before = SINGD(model.parameters())
    train(model, before, range(20))
    optimizer = SINGD(model.named_parameters())
    optimizer.load_state_dict(before.state_dict())
    state, old = optimizer.state[model[0].weight], before.state[model[0].weight]
    assert torch.equal(state["K.matrix"], old["K.matrix"])
    assert torch.equal(state["momentum_buffer"], old["momentum_buffer"])
    assert not state["inputs.mean"].any()
    assert set(optimizer.state[model[0].bias]) == {"momentum_buffer"}
    losses = train(model, optimizer, range(20, 60))
    assert optimizer.state[model[0].weight]["inputs.mean"].all()
    assert losses[-1] < 2 * losses[0]
    again = SINGD(model.named_parameters())
    again.load_state_dict(optimizer.state_dict())


class First(nn.Module):
    """The first feature alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_layer_of_one_input_begins_anew_where_adamw_trained_it(by_rows: bool) -> None:
    model = nn.Sequential(First(), nn.Linear(1, 3).double())
    before = SINGD(model.parameters())
    model(batch()[0]).sum().backward()
    before.step()
    weight, bias = model[1].parameters()
    assert "exp_avg" in before.state[weight]
    optimizer = SINGD(model) if by_rows else SINGD(model.named_parameters())
    optimizer.load_state_dict(before.state_dict())
    assert not optimizer.state[weight]
    assert not optimizer.state[bias]
    losses = train(model, optimizer, range(40))
    assert "K.matrix" in optimizer.state[weight]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    losses = train(model, SINGD(model.named_parameters()), [0] * 60)
    assert losses[-1] < losses[0] / 2


def test_what_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = SINGD(model.named_parameters())
    train(model, optimizer, range(5))
    before = copy.deepcopy(optimizer.state_dict()), values(model)
    model[0].bias.grad[0] = torch.nan
    with pytest.warns(UserWarning, match=r"gradient of '0\.bias' was NaN"):
        optimizer.step()
    assert optimizer.skipped == 1
    assert all(map(torch.equal, values(model), before[1]))
    after = optimizer.state_dict()["state"]
    for index, entries in before[0]["state"].items():
        for name, value in entries.items():
            assert torch.equal(value, after[index][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_biases_before_a_norm_stay_where_they_are(dtype: torch.dtype, autocast: bool) -> None:
    """Their gradients are rounding, and tell no mean."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4),
    ).to(dtype)  # fmt: skip
    optimizer = SINGD(model.named_parameters())
    x, y = torch.rand(16, 3, 8, 8, dtype=dtype) + 1.0, torch.randint(4, (16,))
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    for conv in (model[0], model[3]):
        assert optimizer.state[conv.weight]["inputs.mean"].abs().max() < 100
        assert conv.bias.abs().max() < 100


def test_an_input_with_a_mean_is_learned_faster_than_by_weights_alone() -> None:
    """Adding a number to all inputs is what a bias can make up for."""
    ends = []
    for named in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        x = torch.randn(256, 6).double() + 5.0
        y = torch.sin(x.roll(1, 1) * x).matmul(torch.randn(6, 2).double())
        optimizer = SINGD(model.named_parameters() if named else model.parameters())
        for _ in range(100):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 0.9 * ends[1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_accelerator_skips_what_is_not_finite_and_goes_on(
    bad: float, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the first step, which refreshes factors, as the overflow of a GradScaler is."""
    monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    model = network()
    optimizer = SINGD(model.named_parameters())
    for i in range(6):
        x, y = batch(seed=i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        before = values(model)
        if i == step:
            model[0].weight.grad[0, 0] = bad
        optimizer.step()
        assert all(map(torch.equal, values(model), before)) == (i == step)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert optimizer.skipped == 1
    for entries in optimizer.state.values():
        assert all(t.isfinite().all() for t in entries.values())


def test_stacks_that_a_call_gives_rows_keep_their_rows() -> None:
    """Their bias is AdamW's; without a model no call is seen, and names tell their bias."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(4, 5, 6)),
                nn.Parameter(torch.ones(4, 5)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.mT) + self.bias[:, None]

    model = Experts()
    optimizer = SINGD(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7, 6)).square().mean().backward()
        optimizer.step()
    assert rules(optimizer)["weight"] == "SINGD"
    assert set(rules(SINGD(model.named_parameters()))) == {"weight + bias"}


def test_a_transposed_convolution_has_its_bias_along_its_second_axis() -> None:
    model = nn.ConvTranspose2d(8, 3, 3)
    assert set(rules(SINGD(model.named_parameters()))) == {"weight", "bias"}


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_targets_and_inputs_with_a_mean(mean: float) -> None:
    """The bias alone can move the mean of outputs, and its steps become longer."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 12).double()
    x = torch.randn(64, 16).double() + mean
    y = x @ torch.randn(16, 12).double() / 4 + 5.0
    optimizer = SINGD(layer.named_parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
