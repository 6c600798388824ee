"""Layers of many parameter groups, each with a rate and a decay of its own, step together."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import cases
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.step import bundle, equal
from singd_torch.tensors import pieces


class Network(nn.Module):
    """Four equal blocks, and layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "norm": nn.LayerNorm(6)})
            for _ in range(4)
        )
        self.grouped = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1, groups=2) for _ in range(2))
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for block in self.blocks:
            x = x + block["down"](block["up"](block["norm"](x)).tanh())
        for one in self.grouped:
            x = x + one(x.mT).tanh().mT
        return self.last(x).mean(1)


def groups(model: Network) -> list[dict[str, Any]]:
    """Each layer has a rate of its own, and only weights decay."""
    layers = [model.table, *model.blocks, *model.grouped, model.last]
    found = []
    for i, layer in enumerate(layers):
        for decay in (0.1, 0.0):
            named = [(f"{i}.{n}", p) for n, p in layer.named_parameters()]
            own = [(n, p) for n, p in named if n.endswith("bias") is (decay == 0.0)]
            if own:
                found.append({"params": own, "lr": 0.05 * 0.8**i, "weight_decay": decay})
    return found


def rates_of_biases(model: Network) -> list[dict[str, Any]]:
    found = groups(model)
    for group in found:
        group["lr"] *= 1.0 if group["weight_decay"] else 0.3
    return found


GIVEN: dict[str, Callable[[Network], tuple[Any, ...]]] = {
    "model": lambda model: (model, groups(model)),
    "names": lambda model: (groups(model),),
    "parameters": lambda model: (
        [group | {"params": [p for _, p in group["params"]]} for group in groups(model)],
    ),
    "rates of biases": lambda model: (model, rates_of_biases(model)),
    "names, rates of biases": lambda model: (rates_of_biases(model),),
}


def nothing(step: int, model: Network, optimizer: SINGD) -> None:
    pass


def decay(step: int, model: Network, optimizer: SINGD) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.9


def decay_some(step: int, model: Network, optimizer: SINGD) -> None:
    for group in optimizer.param_groups[:7]:
        group["lr"] *= 0.7


def rest(step: int, model: Network, optimizer: SINGD) -> None:
    """The rate of a group is 0 in some steps."""
    group = optimizer.param_groups[2]
    if step == 2:
        group["kept"], group["lr"] = group["lr"], 0.0
    elif step == 4:
        group["lr"] = group.pop("kept")


def damp(step: int, model: Network, optimizer: SINGD) -> None:
    if step == 3:
        optimizer.param_groups[4]["damping"] = 0.7


def couple(step: int, model: Network, optimizer: SINGD) -> None:
    if step == 3:
        optimizer.param_groups[4]["decoupled_weight_decay"] = False


def turn_into_tensor(step: int, model: Network, optimizer: SINGD) -> None:
    if step == 3:
        for group in optimizer.param_groups[2:4]:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)


def resume(step: int, model: Network, optimizer: SINGD) -> None:
    if step == 3:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def freeze(step: int, model: Network, optimizer: SINGD) -> None:
    for block in model.blocks[:2]:
        block.requires_grad_(step not in (2, 3))
    model.blocks[2]["up"].bias.requires_grad_(step != 3)


CHANGES = [nothing, decay, decay_some, rest, damp, couple, turn_into_tensor, resume, freeze]


def trained(
    change: Callable[[int, Network, SINGD], None], of: str, **given: Any
) -> tuple[Network, SINGD]:
    torch.manual_seed(0)
    model = Network().double()
    optimizer = SINGD(*GIVEN[of](model), fallback_lr=0.0, **given)
    for step in range(6):
        change(step, model, optimizer)
        optimizer.zero_grad()
        x, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layers of each pair of groups step for themselves."""

    def by_group(*groups: Any) -> Any:
        return tuple(map(id, groups))

    monkeypatch.setattr(equal, "likeness", by_group)
    monkeypatch.setattr(bundle, "likeness", by_group)


def place(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_SEVERAL", 1 if where == "bundles" else math.inf)
    if where == "accelerator":
        monkeypatch.setattr(pieces, "on_host", lambda x: False)


@pytest.mark.parametrize("where", ["stacks", "bundles", "accelerator"])
@pytest.mark.parametrize("of", cases(GIVEN, fast=["model", "names, rates of biases"]))
@pytest.mark.parametrize("change", CHANGES)
def test_layers_step_as_each_with_its_rate(
    change: Callable[[int, Network, SINGD], None],
    of: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place("stacks", monkeypatch)
    with monkeypatch.context() as reference:
        apart(reference)
        model, optimizer = trained(change, of)
        expected = optimizer.diagnostics()
    assert len(optimizer._stepper.stacks) == 12
    place(where, monkeypatch)
    other, found = trained(change, of)
    for (name, p), q in zip(other.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert found.diagnostics() == pytest.approx(expected, rel=1e-7)
    if change in (nothing, decay):
        stepper, in_groups = found._stepper, "biases" in of
        assert len(stepper.stacks) == (12 if in_groups else 5)
        assert len(stepper.bundles) == (where != "stacks")


@dataclasses.dataclass
class Constant:
    """A schedule without a hash."""

    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@pytest.mark.parametrize(
    "given", [{"lr_cov": Constant(0.02)}, {"lr": np.asarray(0.01)}, {"momentum": np.asarray(0.8)}]
)
def test_settings_without_a_hash_are_settings(given: dict[str, Any]) -> None:
    trained(nothing, "model", **given)


@pytest.mark.parametrize("of", ["model", "names"])
def test_a_layer_that_begins_late_learns_at_its_first_gradient(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place("stacks", monkeypatch)
    found = []
    for together in (False, True):
        with monkeypatch.context() as patch:
            if not together:
                apart(patch)
            torch.manual_seed(0)
            model = Network().double()
            given = {"T": 10, "growing_T": False, "fallback_lr": 0.0}
            optimizer = SINGD(*GIVEN[of](model), **given)
            for step in range(9):
                x, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                if step < 5:
                    for p in model.blocks[2:].parameters():
                        p.grad = None
                elif step == 5:  # the stacks are made anew
                    optimizer.param_groups[0]["lr"] *= 0.5
                    optimizer.param_groups[2]["lr"] *= 0.5
                optimizer.step()
            found.append(list(model.parameters()))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["stacks", "bundles", "accelerator"])
def test_rates_of_layers_in_few_bits(
    where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for together in (False, True):
        with monkeypatch.context() as patch:
            if not together:
                apart(patch)
            place(where if together else "stacks", patch)
            torch.manual_seed(0)
            model = Network().to(dtype)
            start = copy.deepcopy(list(model.parameters()))
            optimizer = SINGD(model, groups(model), warmup=0)
            x, y = torch.randint(7, (8, 5)), torch.randint(3, (8,))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            found.append(list(model.parameters()))
    norm = torch.linalg.vector_norm
    for p, expected, before in zip(*found, start, strict=True):
        change, rounded = (expected - before).float(), expected.float() * torch.finfo(dtype).eps
        assert norm(p.float() - expected.float()) <= 0.03 * norm(change) + norm(rounded)
