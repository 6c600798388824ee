"""Layers step by the same operations, on an accelerator all: it is the step of each alone."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cases
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.step import bundle
from singd_torch.tensors import pieces


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """Layers of many kinds; two of them are equal. `used` says which are called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.equal = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.attention, self.norm = Attention(), nn.LayerNorm(6)
        self.grouped = nn.ModuleList([nn.Conv1d(6, 6, 3, padding=1, groups=2) for _ in range(2)])
        self.plain = nn.Conv1d(6, 6, 3, padding=1, bias=False)
        self.wide, self.last = nn.Linear(6, 20, bias=False), nn.Linear(20, 3)
        self.used: set[str] = {"attention", "grouped", "equal"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        if "equal" in self.used:
            x = x + self.equal[1](self.equal[0](x).tanh())
        if "attention" in self.used:
            x = x + self.attention(x)
        if "grouped" in self.used:
            y = x.mT
            for one in self.grouped:
                y = one(y).tanh()
            x = x + self.plain(y).mT
        return self.last(self.wide(self.norm(x)).tanh()).mean(1)


def backward(model: nn.Module, scale: Any = 1.0) -> None:
    x, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    (nn.functional.cross_entropy(model(x), y) * scale).backward()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases have a rate of their own, and no decay."""
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return [{"params": others, "weight_decay": 0.1}, {"params": biases, "lr": 0.03}]


# What an optimizer is given. All but the first two learn from gradients.
GIVEN: dict[str, Callable[[nn.Module], tuple[Any, ...]]] = {
    "model": lambda model: (model,),
    "groups": lambda model: (model, groups(model)),
    "parameters": lambda model: (model.parameters(),),
    "names": lambda model: (model.named_parameters(),),
    "named groups": lambda model: (
        [
            {
                "params": [
                    (n, p) for n, p in model.named_parameters() if n.endswith("bias") is biases
                ]
            }
            for biases in (False, True)
        ],
    ),
}


def leave_out(step: int, model: Network, optimizer: SINGD) -> None:
    model.used -= {"grouped"} if step == 2 else set()
    model.used |= {"grouped"} if step == 4 else set()


def freeze(step: int, model: Network, optimizer: SINGD) -> None:
    model.last.bias.requires_grad_(step != 2)


def report(step: int, model: Network, optimizer: SINGD) -> None:
    optimizer.diagnostics()


def replace_state(step: int, model: Network, optimizer: SINGD) -> None:
    own = optimizer.state[model.wide.weight]
    if step == 3:
        own["momentum_buffer"] = own["momentum_buffer"].clone() * 0.5


def resume(step: int, model: Network, optimizer: SINGD) -> None:
    if step == 3:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def begin_momentum(step: int, model: Network, optimizer: SINGD) -> None:
    for group in optimizer.param_groups:
        group["momentum"] = 0.0 if step < 3 else 0.9


def couple(step: int, model: Network, optimizer: SINGD) -> None:
    """In some steps the stacks step alone, with refreshes of their own."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
        group["decoupled_weight_decay"] = step not in (2, 3)


def couple_once(step: int, model: Network, optimizer: SINGD) -> None:
    """In one step, which refreshes, the stacks step alone; the next one refreshes nothing."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
        group["decoupled_weight_decay"] = step != 2


def nothing(step: int, model: Network, optimizer: SINGD) -> None:
    pass


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "small blocks": {"structures": ("blockdiagonal:3", "dense")},
    "hierarchical": {"structures": ("hierarchical:2,1", "triltoeplitz")},
    "no nesterov": {"nesterov": False},
    "no momentum": {"momentum": 0.0},
    "order": {"order": 2, "T": 2, "growing_T": False},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}


def rest_momentum(step: int, model: Network, optimizer: SINGD) -> None:
    """The momentum is 0 in two steps, and a checkpoint is loaded between them."""
    for group in optimizer.param_groups:
        group["momentum"] = 0.0 if step in (2, 3) else 0.9
    resume(step, model, optimizer)


CHANGES = [nothing, leave_out, freeze, report, replace_state, resume, begin_momentum, couple]
CHANGES += [rest_momentum]


PLACES = ["accelerator", "host"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each stack step alone, until `together` is called."""
    monkeypatch.setattr(bundle, "_SEVERAL", math.inf)


def together(monkeypatch: pytest.MonkeyPatch, place: str = "accelerator") -> None:
    """Let stacks step together from now on, as on an accelerator or as on the host."""
    if place == "host":
        monkeypatch.setattr(bundle, "_SEVERAL", 1)
    else:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)


def trained(
    given: dict[str, Any], change: Callable[[int, Network, SINGD], None], of: str
) -> tuple[Network, SINGD]:
    torch.manual_seed(0)
    model = Network().double()
    # of an accelerator, torch's AdamW has powers in float32
    optimizer = SINGD(*GIVEN[of](model), fallback_lr=0.0, **given)
    for step in range(6):
        change(step, model, optimizer)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return model, optimizer


def same(found: tuple[Network, SINGD], expected: tuple[Network, SINGD]) -> None:
    for (name, p), q in zip(found[0].named_parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        own, other = found[1].state[p], expected[1].state[q]
        assert own.keys() == other.keys()
        for key, value in own.items():
            torch.testing.assert_close(value, other[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", cases(GIVEN, fast=["model", "groups"]))
@pytest.mark.parametrize("case", CASES)
def test_all_layers_step_as_each_alone(
    case: str, of: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(CASES[case], nothing, of)
    assert not expected[1]._stepper.bundles
    together(monkeypatch, place)
    found = trained(CASES[case], nothing, of)
    same(found, expected)
    assert bool(found[1]._stepper.bundles) == (case != "coupled decay")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["groups", "names"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_between_steps(
    change: Callable[[int, Network, SINGD], None],
    of: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = trained({}, change, of)
    together(monkeypatch, place)
    found = trained({}, change, of)
    same(found, expected)
    if change is report:
        pairs = found[1].diagnostics(), expected[1].diagnostics()
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-8)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["model", "groups"])
def test_sizes_follow_a_refresh_of_stacks_that_stepped_alone(
    of: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"T": 2, "growing_T": False}
    expected = trained(given, couple_once, of)
    together(monkeypatch, place)
    same(trained(given, couple_once, of), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["model", "names"])
def test_a_scale_of_the_loss_is_taken_out(
    of: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(monkeypatch, place)
    torch.manual_seed(0)
    models = [Network().double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [SINGD(*GIVEN[of](model), fallback_lr=0.0) for model in models]
    scale = torch.tensor(1024.0, dtype=torch.float64)  # a scaler's own is in float32
    optimizers[1].grad_scale = scale  # type: ignore[attr-defined]
    for step in range(4):
        for model, optimizer, scale in zip(models, optimizers, (1.0, 1024.0), strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            backward(model, scale)
            optimizer.step()
    same((models[1], optimizers[1]), (models[0], optimizers[0]))


@pytest.mark.parametrize("of", ["parameters", "names"])
@pytest.mark.parametrize(
    ("of_bias", "given"),
    [
        (torch.float64, {}),
        (torch.bfloat16, {"rounding": "kahan"}),
        (torch.float32, {"momentum_dtype": torch.float64}),
        (torch.float32, {"preconditioner_dtype": (torch.float64, None)}),
        (torch.float32, {"preconditioner_dtype": (torch.bfloat16, torch.bfloat16)}),
    ],
    ids=str,
)
def test_layers_of_several_precisions_step_alone(
    of_bias: torch.dtype, given: dict[str, Any], of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for masked in (False, True):
        if masked:
            together(monkeypatch)
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        layer.bias.data = layer.bias.data.to(of_bias)
        optimizer = SINGD(*GIVEN[of](layer), warmup=0, T=2, growing_T=False, **given)
        for _ in range(4):
            layer.weight.grad = torch.randn(4, 6)
            layer.bias.grad = torch.randn(4).to(of_bias)
            optimizer.step()
        assert optimizer.skipped == 0
        kept = {
            k: (v.dtype, v.shape) for p in layer.parameters() for k, v in optimizer.state[p].items()
        }
        found.append(([p.detach().clone() for p in layer.parameters()], kept))
    assert found[0][1] == found[1][1]
    for p, q in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_in_float16_is_divided_by_its_scale_in_float32(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(monkeypatch, place)
    steps = []
    for scale in (1.0, 2.0**30):  # in float16 the quotient would be zero
        torch.manual_seed(0)
        layer = nn.Linear(8, 4).half()
        before = copy.deepcopy(layer)
        optimizer = SINGD(layer.named_parameters(), warmup=0)
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        for p in layer.parameters():
            p.grad = torch.randn(p.shape).half()
        optimizer.step()
        pairs = zip(layer.parameters(), before.parameters(), strict=True)
        steps.append([p.detach() - q.detach() for p, q in pairs])
    for one, other in zip(*steps, strict=True):
        assert one.any()
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["wide.weight", "last.weight"])
@pytest.mark.parametrize("of", ["model", "names"])
def test_products_out_of_range_stop_their_matrix_alone(
    name: str, of: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(monkeypatch, place)
    torch.manual_seed(0)
    model = Network()
    optimizer = SINGD(*GIVEN[of](model), T=100, growing_T=False)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    before = copy.deepcopy(model)
    weight = model.get_parameter(name)
    next(a for n, a in optimizer.state[weight].items() if n.startswith("C.")).fill_(1e38)
    optimizer.load_state_dict(optimizer.state_dict())  # nothing is kept that was made of factors
    optimizer.zero_grad()
    backward(model)
    told = f"the natural gradient of {name!r} was"
    with pytest.warns(match=told) if place == "host" else contextlib.nullcontext():
        optimizer.step()
    moved = {
        key: not torch.equal(p, q)
        for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    stopped = [key for key in moved if key.startswith(name.removesuffix("weight"))]
    assert not any(moved.pop(key) for key in stopped)
    assert all(moved.values())


def test_bundles_are_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained({}, nothing, "groups")
    together(monkeypatch)
    monkeypatch.setattr(bundle, "_LARGEST", 100)
    found = trained({}, nothing, "groups")
    same(found, expected)
    assert len(found[1]._stepper.bundles) > 2


@pytest.mark.parametrize(
    ("limit", "value"), [("_SEVERAL", 20), ("_SMALL", 0), ("_LARGEST_ON_HOST", 0)]
)
def test_few_or_large_stacks_step_alone_on_the_host(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained({}, nothing, "groups")
    monkeypatch.setattr(bundle, "_SEVERAL", 2)
    assert trained({}, nothing, "groups")[1]._stepper.bundles
    monkeypatch.setattr(bundle, limit, value)
    found = trained({}, nothing, "groups")
    same(found, expected)
    assert not found[1]._stepper.bundles


def test_stacks_that_did_not_step_with_others_step_alone_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = trained({}, leave_out, "model")
    together(monkeypatch, "host")
    found = trained({}, leave_out, "model")
    same(found, expected)
    stepper = found[1]._stepper
    alone = [stack.layers[0].name for stack in stepper.stacks if stack.alone]
    assert alone == ["grouped.0.weight", "plain.weight"]
    assert sum(len(bundle.parts) for bundle in stepper.bundles) == len(stepper.stacks) - len(alone)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"rounding": "kahan"})],
    ids=["float32", "stochastic", "kahan"],
)
def test_products_out_of_range_stop_nothing_else_on_the_host(
    dtype: torch.dtype, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for several in (math.inf, 1):
        monkeypatch.setattr(bundle, "_SEVERAL", several)
        torch.manual_seed(0)
        model = Network().to(dtype)
        optimizer = SINGD(model, weight_decay=0.5, T=100, growing_T=False, **given)
        for step in range(3):
            if step == 2:
                own = optimizer.state[model.wide.weight]
                next(a for n, a in own.items() if n.startswith("C.")).fill_(1e38)
                optimizer.load_state_dict(optimizer.state_dict())
                before = copy.deepcopy(model)
            optimizer.zero_grad()
            backward(model)
            with pytest.warns(match="'wide.weight' was") if step == 2 else contextlib.nullcontext():
                optimizer.step()
        assert torch.equal(model.wide.weight, before.wide.weight)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        found.append([(p.float() - q.float(), q.float()) for p, q in pairs])
    norm, unit = torch.linalg.vector_norm, torch.finfo(dtype).eps
    for (alone, weight), (both, _) in zip(*found, strict=True):
        assert norm(both - alone) <= 0.03 * norm(alone) + 2.0 * unit * norm(weight)
        assert norm(both) > 0.0 or norm(alone) == 0.0


class Views(nn.Module):
    """Two equal layers in one memory, and layers of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, n) for n in (6, 6, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers[1](self.layers[0](x).tanh())
        return self.layers[2](y).square().mean() + self.layers[3](y).square().mean()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_layers_in_one_memory_step_one_after_the_other(
    rounding: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = []
    for bundled in (False, True):
        if bundled:
            together(monkeypatch, place)
        torch.manual_seed(0)
        model = Views().bfloat16()
        model.layers[1].weight.data = model.layers[0].weight.data
        before = copy.deepcopy(model.layers[0].weight)
        optimizer = SINGD(model, warmup=0, rounding=rounding)
        model(torch.randn(8, 6).bfloat16()).backward()
        optimizer.step()
        changes.append((model.layers[0].weight - before).float())
    alone, found = changes
    assert torch.linalg.vector_norm(found - alone) <= 0.05 * torch.linalg.vector_norm(alone)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["model", "names"])
def test_weights_in_bfloat16_step_nearly_as_on_the_host(
    of: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for masked in (False, True):
        if masked:
            together(monkeypatch, place)
        torch.manual_seed(0)
        model = Network().bfloat16()
        before = copy.deepcopy(model)
        optimizer = SINGD(*GIVEN[of](model), warmup=0)
        backward(model)
        optimizer.step()
        assert optimizer.skipped == 0
        models.append([p - q for p, q in zip(model.parameters(), before.parameters(), strict=True)])
    for change, expected in zip(*models, strict=True):
        size = torch.linalg.vector_norm(expected.float())
        assert torch.linalg.vector_norm(change.float() - expected.float()) <= 0.03 * size


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("given", [{}, {"rounding": "kahan"}], ids=["stochastic", "kahan"])
def test_a_bias_in_bfloat16_that_is_frozen_stays(
    given: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(monkeypatch, place)
    model = Network().bfloat16()
    optimizer = SINGD(model, warmup=0, weight_decay=0.1, **given)
    for step in range(4):
        model.last.bias.requires_grad_(step < 2)
        before = copy.deepcopy(model.last)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert torch.equal(before.bias, model.last.bias) is (step >= 2)
        assert not torch.equal(before.weight, model.last.weight)


def test_lists_of_one_call_have_one_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    # else CUDA adds one pair after the other, of linear layers too
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    model = nn.Sequential(convolutions, nn.Flatten(), nn.Linear(5, 6), nn.Linear(6, 2))
    model.to(memory_format=torch.channels_last)
    optimizer, seen, add = SINGD(model), [], torch._foreach_add_
    monkeypatch.setattr(pieces, "on_host", lambda x: False)

    def recorded(weights: Any, steps: Any, **given: Any) -> None:
        seen.append({p.is_contiguous() for p in weights})
        add(weights, steps, **given)

    monkeypatch.setattr(torch, "_foreach_add_", recorded)
    model(torch.randn(2, 3, 5, 5)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert {True} in seen
    assert {False} in seen
    assert {True, False} not in seen
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
