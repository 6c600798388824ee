"""Parameters that show no rows: in a model, and without one."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singd_core import Fallback, Optimizer
from singd_torch import SINGD, estimate

# Relative to the largest entry, float64: ten steps that divide by small numbers here and there.
CLOSE = 1e-11


class Recurrent(nn.Module):
    """A recurrence, a mixture of experts and a computed weight, between two known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.cell = nn.LSTM(8, 6, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 6, 6) / 3)
        self.also = nn.Parameter(torch.randn(2, 6, 6) / 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.cell(self.first(x))
        h = torch.einsum("btd,edo->bto", h, self.experts @ self.also)
        return self.out((h * self.scale).tanh())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 5, 3), torch.randn(16, 5, 2)


def train(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor], n: int) -> list[float]:
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = (model(data[0]) - data[1]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


BUILD: dict[str, Callable[[nn.Module], SINGD]] = {
    "of the model": SINGD,
    "without a model": lambda model: SINGD(model.parameters()),
}
both = pytest.mark.parametrize("build", BUILD.values(), ids=list(BUILD))


def rules(optimizer: SINGD) -> dict[str, str]:
    """What the table says of each parameter."""
    lines = [line.split("  ") for line in repr(optimizer).splitlines()[2:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {name: rule for name, _, rule, *_ in cells}


def test_the_table_says_what_shows_no_rows() -> None:
    found = rules(SINGD(Recurrent()))
    assert found == {
        "first.weight + bias": "SINGD",
        "experts": "SINGD without rows",
        "also": "SINGD without rows",
        "cell.weight_ih_l0 + bias_ih_l0": "SINGD without rows",
        "cell.weight_hh_l0 + bias_hh_l0": "SINGD without rows",
        "out.parametrizations.weight.original1": "SINGD without rows",
        "out.parametrizations.weight.original0": "AdamW",
        "scale": "AdamW",
        "out.bias": "AdamW",
    }


@pytest.mark.parametrize("given", [{"recipe": "paper"}, {"kfac": True}], ids=str)
def test_adamw_trains_them_as_the_paper_does(given: dict[str, Any]) -> None:
    assert set(rules(SINGD(Recurrent(), **given)).values()) == {
        "KFAC" if "kfac" in given else "SINGD",
        "AdamW",
    }


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_are_those_of_the_pure_optimizer(compiled: bool) -> None:
    """Equal ones step as one, and do not show it."""
    shapes = {"a": (4, 6), "b": (4, 6), "stack": (2, 3, 5), "kernel": (4, 3, 2, 2), "v": (5,)}
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes.values()]
    ours = SINGD(params, compile_step={"backend": "eager"} if compiled else False)
    pure = Optimizer({}, fallback=Fallback(lr=0.01))
    theirs: Any = {name: p.detach().numpy().copy() for name, p in zip(shapes, params, strict=True)}
    state = pure.init(theirs)
    for _ in range(24):  # the third gap is of two steps
        for p in params:
            p.grad = torch.randn_like(p)
        grads = {name: p.grad.numpy() for name, p in zip(shapes, params, strict=True)}
        updates, state = pure.update(grads, state, theirs)
        theirs = pure.apply(theirs, updates)
        ours.step()
    for p, expected in zip(params, theirs.values(), strict=True):
        size = float(np.max(np.abs(expected)))
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=CLOSE * size)


@both
def test_a_model_learns(build: Callable[[nn.Module], SINGD]) -> None:
    model, data = Recurrent(), batch()
    losses = [train(net, o, data, 60)[-1] for net, o in alternatives(model, build)]
    assert losses[0] < 0.7 * losses[1]


def alternatives(model: nn.Module, build: Callable[[nn.Module], Any]) -> list[Any]:
    twin = copy.deepcopy(model)
    return [(model, build(model)), (twin, torch.optim.AdamW(twin.parameters(), lr=0.01))]


@both
def test_a_checkpoint_goes_on_where_it_stopped(build: Callable[[nn.Module], SINGD]) -> None:
    model, data = Recurrent(), batch()
    optimizer = build(model)
    train(model, optimizer, data, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Recurrent()
    other.load_state_dict(weights)
    resumed = build(other)
    resumed.load_state_dict(state)
    assert train(model, optimizer, data, 5) == train(other, resumed, data, 5)


@both
def test_a_copy_trains_its_own_model(build: Callable[[nn.Module], SINGD]) -> None:
    model, data = Recurrent(), batch()
    optimizer = build(model)
    train(model, optimizer, data, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, data, 5) == train(twin, copied, data, 5)


@both
def test_the_scale_of_the_loss_changes_nothing(build: Callable[[nn.Module], SINGD]) -> None:
    model, data = Recurrent(), batch()
    twin = copy.deepcopy(model)
    for net, scale in ((model, 1.0), (twin, 1024.0)):
        optimizer = build(net)
        for _ in range(4):
            optimizer.zero_grad()
            (scale * (net(data[0]) - data[1]).square().mean()).backward()
            for name, p in net.named_parameters():
                if p.ndim < 2 or name.endswith("original0"):
                    p.grad = None  # AdamW's epsilon has a scale
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@both
def test_what_is_not_finite_changes_nothing(build: Callable[[nn.Module], SINGD]) -> None:
    model, data = Recurrent(), batch()
    optimizer = build(model)
    train(model, optimizer, data, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    model(data[0]).sum().backward()
    assert model.experts.grad is not None
    model.experts.grad[1, 2, 3] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][name], p) for name, p in after[0].items())
    for i, entries in before[1].items():
        assert all(torch.equal(entries[name], a) for name, a in after[1][i].items())
    assert optimizer.skipped == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_sixteen_bits(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(8, 6).to(dtype))
    optimizer = SINGD([p], lr=0.5, warmup=0)
    for _ in range(30):
        p.grad = p.detach().clone()
        optimizer.step()
    assert optimizer.skipped == 0
    assert p.float().square().mean() < 0.1


def test_parameters_are_given_as_to_any_optimizer() -> None:
    model = Recurrent()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "lr": 0.05}, {"params": others, "fallback_lr": 0.02}]
    optimizer = SINGD(groups, structures=("diagonal", "diagonal"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.12]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    data, losses = batch(), []
    for _ in range(30):
        losses += train(model, optimizer, data, 1)
        schedule.step()
    assert losses[-1] < losses[0]
    assert "params[0]" in repr(optimizer)
    assert "cell.weight_hh_l0" in repr(SINGD(model.named_parameters()))


def test_a_model_without_a_model_shows_no_rows() -> None:
    model = Recurrent()
    optimizer = SINGD(model.parameters())
    train(model, optimizer, batch(), 2)
    assert set(rules(optimizer).values()) == {"SINGD without rows", "AdamW"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_estimate_is_what_the_state_takes() -> None:
    model = Recurrent()
    optimizer = SINGD(model)
    train(model, optimizer, batch(), 1)
    counts = "averages.", "late.", "step"
    size = sum(
        a.nbytes
        for entries in optimizer.state.values()
        for name, a in entries.items()
        if not name.startswith(counts)
    )
    assert estimate(model).total == size


def test_diagnostics_of_what_shows_no_rows() -> None:
    model = Recurrent()
    optimizer = SINGD(model)
    optimizer.diagnostics()
    train(model, optimizer, batch(), 2)
    found = optimizer.diagnostics()
    own = {name.partition("/")[2] for name in found if name.startswith("experts/")}
    assert own == {
        "K_norm", "C_norm", "K_step", "C_step", "K_bounded", "C_bounded", "C_damping",
        "agreement", "update",
    }  # fmt: skip
    assert all(np.isfinite(list(found.values())))


def test_a_frozen_one_stays() -> None:
    model, data = Recurrent(), batch()
    optimizer = SINGD(model)
    train(model, optimizer, data, 2)
    model.also.requires_grad_(False)
    before = model.also.clone()
    train(model, optimizer, data, 2)
    assert torch.equal(model.also, before)
