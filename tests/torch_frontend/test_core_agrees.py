"""singd_torch.SINGD takes the steps that the pure optimizer takes on NumPy with the same data."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import watched
from torch import Tensor, nn

from singd_core import Fallback, Optimizer
from singd_torch import SINGD

# Relative to the largest entry, float64: ten steps that divide by small numbers here and there.
CLOSE = 1e-11

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "normalized, T = 3": {"T": 3, "growing_T": False, "weight_decay": 0.1},
    "paper": {"recipe": "paper", "T": 2, "weight_decay": 0.1, "damping": 0.1},
    "kfac": {"kfac": True},
    "reduce": {"kfac_approx": "reduce"},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:4", "blockdiagonal:3")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:2,1", "hierarchical:1,1")},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "no look-ahead": {"nesterov": False, "warmup": 3},
    "no momentum": {"momentum": 0.0},
    "schedule of the factors": {"lr_cov": lambda step: 0.3 / (1 + step)},
    "schedule of the rate": {"lr": 0.1},
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu_(self.conv(x)).flatten(2).mT)
        return self.out(torch.tanh(self.hidden(x)) * self.scale).mean(1)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_the_pure_optimizer(case: str) -> None:
    model, given = Network().double(), CASES[case]
    ours = SINGD(model, fallback_lr=0.01, **given)
    layers = {layer.name: layer for layer in watched.layers(ours)}
    owned = {p for layer in layers.values() for p in layer.parameters}

    def tree(value: Any) -> dict[str, Any]:
        """The parameters, or what `value` takes of each, as the core wants them."""
        found: dict[str, Any] = {}
        for name, layer in layers.items():
            parts = tuple(value(p) for p in layer.parameters)
            found[name] = parts if len(parts) == 2 else parts[0]
        rest = {n: p for n, p in model.named_parameters() if p not in owned}
        return found | {n: value(p) for n, p in rest.items()}

    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def see(layer: Any, source: Any, x: Tensor, g: Tensor) -> None:
        rows[layer.name] = x.numpy().copy(), g.numpy().copy()

    watched.see_rows(ours, see)
    params = tree(lambda p: p.detach().numpy().copy())
    kinds = {name: layer.kind for name, layer in layers.items()}
    core = Optimizer(kinds, fallback=Fallback(lr=0.01), **given)
    state = core.init(params)
    for i in range(10):
        if "lr" in given:
            ours.param_groups[0]["lr"] = rate = 0.1 / (1 + i % 7)
            core.settings = dataclasses.replace(core.settings, lr=rate)
            core.fallback = Fallback(lr=0.01 * rate / 0.1)
        ours.zero_grad()
        rows.clear()
        x, y = torch.randn(8, 4, 3, 4).double(), torch.randint(3, (8,))
        nn.functional.cross_entropy(model(x), y).backward()
        assert core.due(state) == bool(rows)
        grads = tree(lambda p: p.grad.numpy().copy())
        updates, state = core.update(grads, state, params, rows or None)
        params = core.apply(params, updates)
        ours.step()
    reached = tree(lambda p: p.detach().numpy())
    for name, value in params.items():
        pairs = (
            zip(value, reached[name], strict=True)
            if isinstance(value, tuple)
            else [(value, reached[name])]
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * np.abs(b).max(), err_msg=name)
    for name, layer in layers.items():
        entries = ours.state[layer.weight]
        for key, a in state.layers[name].factors.named_arrays():
            b = entries[key].numpy()
            size = np.abs(b).max(initial=1.0)
            np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * size, err_msg=f"{name} {key}")
    assert (state.skipped, ours.skipped) == (0, 0)
