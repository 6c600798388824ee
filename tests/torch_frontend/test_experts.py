"""Weights of three axes, a matrix for each expert: rows of the products that are handed them."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_calls import CALLS, GROUPED, IN_OUT, OUT_IN, D, E, Experts, O, model_of
from torch import Tensor, nn
from uses import draw, loss_of
from watched import CLOSE, Watched, check_rows, layers, table

import singd_torch.tensors.pieces
from singd_torch import SINGD, check


@pytest.mark.parametrize("case", CALLS)
def test_rows_multiply_to_the_gradient_of_each_matrix(case: str) -> None:
    torch.manual_seed(0)
    model, x = model_of(case)
    name = "inner.W" if case.startswith("checkpoint") else "W"
    optimizer = Watched(model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.products.clear()
        loss_of(model(x)).backward()
        [layer] = [own for own in layers(optimizer) if own.name == name]
        found = {i: own for (own_name, i), own in optimizer.products.items() if own_name == name}
        gradient = layer.kind.matrix(layer.weight.grad)
        product = torch.stack([found.get(i, 0.0 * own) for i, own in enumerate(gradient)])
        assert (product - gradient).norm() <= CLOSE * gradient.norm(), step
        optimizer.step()
    assert table(optimizer)[name] == "SINGD"
    assert optimizer.skipped == 0
    assert check(model, lambda model: loss_of(model(x)))[name] < 1e-12


@pytest.mark.skipif(not GROUPED, reason="torch has no grouped products")
@pytest.mark.parametrize("where", ["host", "accelerator"])
@pytest.mark.parametrize("turned", [False, True], ids=["in out", "out in"])
def test_grouped_products(turned: bool, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "accelerator":
        monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    ends = torch.tensor([5, 5, 16], dtype=torch.int32)

    def call(x: Tensor, W: Tensor) -> Tensor:
        return F.grouped_mm(x, W.mT if turned else W, offs=ends)

    model = nn.Module()
    model.W = nn.Parameter(torch.randn(E, 8, 16) if turned else torch.randn(E, 16, 8))
    model.forward = lambda x: call(x, model.W)  # type: ignore[method-assign]
    x = torch.randn(16, 16)
    optimizer = Watched(model)
    loss_of(model(x)).backward()
    gradient = model.W.grad if turned else model.W.grad.mT
    product = torch.stack(
        [optimizer.products.get(("W", i), 0.0 * own) for i, own in enumerate(gradient)]
    )
    assert (product - gradient).norm() <= 1e-5 * gradient.norm()
    optimizer.step()
    assert table(optimizer)["W"] == "SINGD"
    assert optimizer.skipped == 0


@pytest.mark.skipif(not GROUPED, reason="torch has no grouped products")
def test_grouped_products_of_many_rows_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    ends, x = torch.tensor([0, 700, 1024], dtype=torch.int32), torch.randn(1024, 16)

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(E, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.grouped_mm(x, self.W, offs=ends)

    assert list(check(Grouped(), lambda model: loss_of(model(x)))) == ["W"]


def test_rows_of_groups_that_an_accelerator_samples_are_of_each_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host does not know how many there are. A sample of equal rows has the sums of all."""
    monkeypatch.setattr(singd_torch.tensors.pieces, "on_host", lambda x: False)
    ends = torch.tensor([3, 40, 40])
    x = torch.arange(40.0)[:, None] < 3
    rows = singd_torch.layers.products._Grouped(ends)(x.double(), 1.0 + x.double(), 8)
    found = [(one.part, one.kept.sum(), (one.g * one.kept[:, None]).square().sum()) for one in rows]
    assert [(part, int(n)) for part, n, _ in found] == [(0, 3), (1, 8), (2, 0)]
    torch.testing.assert_close(found[0][2], torch.tensor(3 * 4.0, dtype=torch.float64))
    torch.testing.assert_close(found[1][2], torch.tensor(37.0, dtype=torch.float64))


@pytest.mark.parametrize("turned", [False, True], ids=["out in", "in out"])
def test_factors_and_steps_are_those_of_layers_apart(turned: bool) -> None:
    torch.manual_seed(0)
    shape = IN_OUT if turned else OUT_IN
    model = Experts(shape, lambda x, W: x @ (W if turned else W.mT)).double()
    apart = nn.ModuleList(nn.Linear(D, O, bias=False).double() for _ in range(E))
    given: dict[str, Any] = {"structures": "dense", "rows": float("inf")}
    stack, layers = SINGD(model, [model.W], **given), SINGD(apart, **given)
    with torch.no_grad():
        for i, layer in enumerate(apart):
            layer.weight.copy_(model.W[i].mT if turned else model.W[i])
    for _ in range(5):
        x = draw(E, 6, D)
        stack.zero_grad()
        layers.zero_grad()
        loss_of(model(x)).backward()
        h = torch.tanh(model.first(x)).detach()
        loss_of(torch.stack([layer(own) for layer, own in zip(apart, h, strict=True)])).backward()
        for i, layer in enumerate(apart):
            gradient = model.W.grad[i].mT if turned else model.W.grad[i]
            torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-9, atol=1e-12)
        stack.step()
        layers.step()
        for i, layer in enumerate(apart):
            own, its = stack.state[model.W], layers.state[layer.weight]
            for key in ("K.matrix", "C.matrix", "averages.t_U", "averages.t_G"):
                torch.testing.assert_close(own[key][i], its[key], rtol=1e-9, atol=1e-12)


def mixed(x: Tensor, W: Tensor) -> Tensor:
    return x @ W @ W.mT


OTHERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "masked": (lambda x, W: x @ (W * (W > 0)), "used by torch.Tensor.mul"),
    "part that is scaled": (lambda x, W: x @ (2 * W[0]), "used by torch.Tensor.mul"),
    "gathered": (lambda x, W: torch.bmm(x, W[torch.tensor([0, 1, 1])]), "used by torch.Tensor"),
    "dots that are summed": (
        lambda x, W: torch.einsum("...nd,...df->nf", x, W),
        "used by torch",
    ),
    "both sides": (mixed, "used both plain and transposed"),
    "both sides by bmm": (
        lambda x, W: torch.bmm(torch.bmm(x, W), W.mT),
        "used both plain and transposed",
    ),
    "einsum that repeats a number": (
        lambda x, W: torch.einsum("end,edf->enf", x[..., :1], W),
        "used by torch",
    ),
    "bag of axes": (lambda x, W: torch.einsum("end,edf->ef", x, W), "used by torch"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_such_product_learns_from_gradients_and_the_table_says_why(case: str) -> None:
    call, reason = OTHERS[case]
    model = Experts(IN_OUT, call).double()
    optimizer, before = SINGD(model), model.W.detach().clone()
    for _ in range(2):  # warnings are errors here: rows are not promised
        optimizer.zero_grad()
        loss_of(model(draw(E, 6, D))).backward()
        optimizer.step()
    line = next(line for line in repr(optimizer).splitlines() if line.startswith("W "))
    assert "SINGD without rows" in line
    assert reason in line
    assert not torch.equal(model.W, before)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("seen", [True, False])
def test_a_checkpoint_goes_on_where_it_stopped(seen: bool) -> None:
    torch.manual_seed(0)
    call: Any = torch.bmm if seen else OTHERS["masked"][0]

    def train(model: nn.Module, optimizer: SINGD, n: int) -> None:
        for i in range(n):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(E, 6, D, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()

    model = Experts(IN_OUT, call).double()
    optimizer = SINGD(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Experts(IN_OUT, call).double()
    other.load_state_dict(weights)
    resumed = SINGD(other)
    resumed.load_state_dict(state)
    twin, copied = copy.deepcopy((model, optimizer))
    for own in ((model, optimizer), (other, resumed), (twin, copied)):
        train(*own, 4)
    assert repr(resumed) == repr(optimizer) == repr(copied)
    for p, q, r in zip(model.parameters(), other.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


class Late(nn.Module):
    """A layer, and experts that are not used in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.W = nn.Linear(D, D), nn.Parameter(torch.randn(2, D, D))

    def forward(self, x: Tensor, *, used: bool) -> Tensor:
        h = self.first(x)
        return torch.einsum("nd,edf->enf", h, self.W) if used else h


def test_experts_that_are_used_first_after_a_checkpoint() -> None:
    model, x = Late().double(), torch.randn(6, D, dtype=torch.float64)

    def train(model: Late, optimizer: SINGD, used: bool) -> None:
        optimizer.zero_grad()
        loss_of(model(x, used=used)).backward()
        optimizer.step()

    optimizer = SINGD(model, T=10, growing_T=False)
    for _ in range(3):
        train(model, optimizer, used=False)
    other = copy.deepcopy(model)
    resumed = SINGD(other, T=10, growing_T=False)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(9):  # until the calls of a refresh are seen
        train(model, optimizer, used=True)
        train(other, resumed, used=True)
        assert repr(resumed) == repr(optimizer)
        assert torch.equal(model.W, other.W)
    assert table(optimizer)["W"] == "SINGD"


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_mixture_of_experts_of_transformers(experts: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    config._experts_implementation = experts
    model = transformers.MixtralForCausalLM(config)
    tokens = torch.randint(32, (4, 8))
    found = check(model, lambda model: model(input_ids=tokens, labels=tokens).loss)
    stacks = [name for name in found if "experts" in name]
    assert len(stacks) == 2
    optimizer = SINGD(model)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(table(optimizer)[name] == "SINGD" for name in stacks)


def test_weights_of_three_axes_that_are_added_need_no_word() -> None:
    """As tables of positions."""
    model = nn.Module()
    model.positions = nn.Parameter(0.02 * torch.randn(2, 7, D))
    model.head = nn.Linear(D, 2)
    model.forward = lambda x: model.head(x + model.positions)  # type: ignore[method-assign]
    optimizer = SINGD(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 7, D)).square().mean().backward()
            optimizer.step()
    assert table(optimizer)["positions"] == "SINGD without rows"


@pytest.mark.parametrize("equation", ["od,bnd->bno", "o d, ... d -> ... o"])
def test_einsum_with_the_weight_of_a_linear_layer(equation: str) -> None:
    layer = nn.Linear(D, O, bias=False)
    model = nn.Sequential(layer)
    model.forward = lambda x: torch.einsum(equation, layer.weight, x)  # type: ignore[method-assign]
    check_rows(model.double(), lambda m: loss_of(m(draw(2, 6, D))))


@pytest.mark.parametrize("case", ["bmm", "loop, linear"])
def test_the_scale_of_the_loss_changes_nothing(case: str) -> None:
    model, x = model_of(case)
    twin = copy.deepcopy(model)
    for net, scale in ((model, 1.0), (twin, 1024.0)):
        optimizer = SINGD(net)
        for _ in range(4):
            optimizer.zero_grad()
            (scale * loss_of(net(x))).backward()
            net.first.bias.grad = None
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
