"""Steps between two refreshes can be replayed: shown by a graph as CUDA takes them, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd_torch import SINGD
from singd_torch.tensors import pieces


class Graph(TorchDispatchMode):
    """What is launched within it, to be launched again: the same numbers of the host and memory."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function.overloadpacket.__name__ != "_local_scalar_dense", "the host waits"
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Launch it all again."""
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Network(nn.Module):
    """Equal layers, groups, an embedding, norms, and a matrix that shows no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 12)
        self.equal = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.grouped = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3, bias=False)
        self.recurrent = nn.Parameter(0.3 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        for layer in self.equal:
            y = y + layer(y).tanh()
        y = self.last(self.norm(self.grouped(y.mT).mT).tanh())
        return y.mean(1) @ self.recurrent


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "hierarchical": {"structures": ("hierarchical:2,1", "triltoeplitz")},
    "kfac": {"kfac": True},
    "paper": {"recipe": "paper"},
}


def train(given: dict[str, Any], *, replays: bool) -> tuple[nn.Module, SINGD, int]:
    torch.manual_seed(0)
    model = Network()
    optimizer = SINGD(model, T=5, growing_T=False, warmup=3, capturable=True, **given)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    graph, used = None, 0
    for step in range(24):
        x, y = torch.randint(9, (6, 5)), torch.randint(3, (6,))
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        if step == 13:
            model.last.weight.grad[0, 0] = torch.nan
        if not replays or not optimizer.replayable:
            optimizer.step()
        elif graph is None:  # on a GPU nothing happens then, and a replay follows
            with Graph() as graph:
                optimizer.step()
        else:
            graph.replay()
            optimizer.replayed()
            used += 1
        schedule.step()
    return model, optimizer, used


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    expected, other, _ = train(CASES[case], replays=False)
    model, optimizer, used = train(CASES[case], replays=True)
    assert used >= 10
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert other.skipped == optimizer.skipped == 1
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][key]), f"{name} | {key}"


def test_a_step_between_refreshes_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    network, optimizer, _ = train({}, replays=False)
    where = [v.data_ptr() for own in optimizer.state.values() for v in own.values()]
    for _ in range(6):
        network(torch.randint(9, (6, 5))).square().mean().backward()
        optimizer.step()
    assert [v.data_ptr() for own in optimizer.state.values() for v in own.values()] == where
    assert all(p.grad is not None for p in network.parameters())


def test_what_preconditions_stays_where_it_is_while_gaps_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, kept = SINGD(model, capturable=True, structures="dense"), list[Any]()
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(6, 40)).square().sum().backward()
        optimizer.step()
        kept.append([stack._fixed for stack in optimizer._stepper.stacks])
    assert all(a is b for one in kept for a, b in zip(one, kept[0], strict=True))


def test_what_cannot_be_replayed_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model, capturable=True)
    assert not optimizer.replayable
    with pytest.raises(RuntimeError, match="take it with step"):
        optimizer.replayed()
    with pytest.raises(ValueError, match="compile_step exclude each other"):
        SINGD(model, capturable=True, compile_step=True)


def test_rates_are_tensors_also_of_groups_that_are_added_or_loaded() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    optimizer = SINGD(model, model[0].parameters(), lr=0.1, capturable=True)
    saved = copy.deepcopy(SINGD(model, model[0].parameters(), lr=0.2).state_dict())
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.4})
    optimizer.add_param_group({"params": []})
    rates = [group[name] for group in optimizer.param_groups[:2] for name in ("lr", "largest_lr")]
    assert all(isinstance(rate, Tensor) for rate in rates)
    assert [float(rate) for rate in rates] == pytest.approx([0.2, 0.0, 0.4, 0.0])
    model[1](model[0](torch.randn(4, 3))).sum().backward()
    optimizer.step()
