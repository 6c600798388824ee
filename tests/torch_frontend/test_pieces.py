"""Large matrices take the steps of small ones, piece by piece."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd_core.preconditioner import Preconditioner, Side
from singd_core.structures import Diagonal
from singd_torch import SINGD
from singd_torch.capture import queue
from singd_torch.layers.pending import Pending
from singd_torch.step import solve, stack_step
from singd_torch.tensors import pieces

CASES: dict[str, dict[str, Any]] = {
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "dense K": {"structures": ("dense", "diagonal"), "T": 3, "growing_T": False},
    "dense": {"structures": ("dense", "dense")},
    "blocks": {"structures": ("blockdiagonal:4", "blockdiagonal:2"), "T": 3, "growing_T": False},
    "blocks of C": {"structures": ("diagonal", "blockdiagonal:3")},
    "Toeplitz": {"structures": ("triltoeplitz", "hierarchical:1,2")},
    "paper": {"recipe": "paper", "structures": ("diagonal", "diagonal"), "lr": 1e-2},
    "paper, decay": {"recipe": "paper", "structures": ("tril", "diagonal"), "weight_decay": 0.1},
    "no momentum": {"structures": ("diagonal", "diagonal"), "momentum": 0.0},
    "other dtype": {
        "structures": ("diagonal", "diagonal"),
        "preconditioner_dtype": (torch.float64, torch.float64),
    },
}


class Network(nn.Module):
    """A layer without a bias, a transposed convolution, groups, and a layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 3, 3)
        self.groups = nn.Conv1d(3, 6, 3, groups=3)
        self.first = nn.Linear(24, 7, bias=False)
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(torch.tanh(self.up(x)))
        return self.last(torch.tanh(self.first(x.flatten(1))))  # type: ignore[no-any-return]


def run(given: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    optimizer = SINGD(model, **given)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.randn(6, 2, 4, generator=generator)
        F.cross_entropy(model(x), torch.randint(5, (6,), generator=generator)).backward()
        optimizer.step()
    state = {
        f"{name}/{k}": v
        for name, p in model.named_parameters()
        for k, v in optimizer.state[p].items()
    }
    return dict(model.named_parameters()) | state


@pytest.mark.parametrize("case", CASES)
def test_pieces_take_the_steps_of_the_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Network()
    twin = copy.deepcopy(model)
    expected = run(CASES[case], model)
    monkeypatch.setattr(pieces, "_PIECE", 16)
    cuts: list[int] = []

    def counted(*args: Any, cut: Callable[..., Any] = pieces.cut) -> Any:
        found = cut(*args)
        cuts.append(len(found))
        return found

    for module in (stack_step, solve):
        monkeypatch.setattr(module, "cut", counted)
    ours = run(CASES[case], twin)
    assert max(cuts) > 2
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("structure", ["triltoeplitz", "triutoeplitz"])
def test_the_rows_of_a_large_call_are_measured_in_pieces(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(15, 7)).double()
    x, y = torch.randn(40, 2, 4, dtype=torch.float64), torch.randint(7, (40,))
    calls: list[int] = []

    def measured(*given: Any, measure: Callable[..., Any] = Pending.measured, **how: Any) -> Any:
        _, rows, _ = given
        calls.append(len(rows))
        return measure(*given, **how)

    monkeypatch.setattr(Pending, "measured", measured)

    def stepped() -> tuple[int, SINGD]:
        twin = copy.deepcopy(model)
        optimizer = SINGD(twin, structures=(structure, structure))
        calls.clear()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        return len(calls), optimizer

    whole, expected = stepped()
    monkeypatch.setattr(queue, "SMALL", 0)
    monkeypatch.setattr(pieces, "_PIECE", 400)
    cut, ours = stepped()
    assert (whole, cut > 8) == (2, True)
    for p, q in zip(ours.state.values(), expected.state.values(), strict=True):
        for name, value in q.items():
            torch.testing.assert_close(p[name], value, rtol=1e-11, atol=1e-13, msg=name)


def test_preconditioner_of_some_rows() -> None:
    K, C = (Diagonal(torch.rand(d) + 0.5) for d in (4, 3))
    gradient = torch.randn(3, 4)
    whole = Preconditioner(Side(K, False), Side(C, False))
    rows = whole.rows(slice(1, 3))
    assert rows is not None
    torch.testing.assert_close(rows(gradient[1:3]), whole(gradient)[1:3])


def test_a_step_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 16)
    torch.manual_seed(0)
    model = Network()
    optimizer = SINGD(model, **CASES["diagonal"])
    for bad in (0.0, float("nan"), float("inf")):
        before = copy.deepcopy(dict(model.named_parameters()))
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 2, 4)), torch.zeros(6, dtype=torch.long)).backward()
        assert model.first.weight.grad is not None
        model.first.weight.grad[5, 3] += bad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*NaN or infinite")
            optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (bad != 0.0), name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN or infinite")
        assert optimizer.skipped == 2
