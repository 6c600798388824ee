"""A run that is saved and resumed is the run that was never interrupted, bit for bit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import layers

from singd_torch import SINGD

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Network(nn.Module):
    """Layers of every kind, and parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.ones(()))
        self.hidden = nn.Linear(16, 8)
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu_(self.conv(x)).flatten(2).mT.flatten(1))
        return self.out(torch.tanh(self.hidden(x)) * self.scale)


def batches(dtype: torch.dtype, n: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 2, 4, 4, generator=g).to(dtype), torch.randint(3, (8,), generator=g))
        for _ in range(n)
    ]


def train(model: nn.Module, optimizer: SINGD, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def all_numbers(model: nn.Module, optimizer: SINGD) -> dict[str, Tensor]:
    found = dict(model.named_parameters())
    for name, p in model.named_parameters():
        found |= {f"{name} | {key}": value for key, value in optimizer.state[p].items()}
    return {name: value.detach() for name, value in found.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def check_resumed(
    dtype: torch.dtype,
    given: dict[str, Any],
    before: int = 4,
    after: int = 4,
    make: Callable[[], nn.Module] = Network,
) -> None:
    data = batches(dtype, before + after)
    model = make().to(dtype)
    optimizer = SINGD(model, **given)
    train(model, optimizer, data[:before])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data[before:])

    resumed = make().to(dtype)
    resumed.load_state_dict(saved["model"])
    again = SINGD(resumed, **given)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, data[before:])
    assert_equal(all_numbers(model, optimizer), all_numbers(resumed, again))
    assert again.skipped == optimizer.skipped == 0


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (BF16, {}),
    "bfloat16 with float32 factors": (BF16, {"preconditioner_dtype": (F32, F32)}),
    "bfloat16 with one float32 factor": (BF16, {"preconditioner_dtype": (None, F32)}),
    "float16": (F16, {}),
    "float32 with bfloat16 factors": (F32, {"preconditioner_dtype": (BF16, BF16)}),
    "kfac": (F32, {"kfac": True}),
    "kfac, bfloat16": (BF16, {"kfac": True}),
    "Riemannian momentum": (F32, {"recipe": "paper", "T": 2}),
    "in the middle of T": (F32, {"recipe": "paper", "T": 3}),
    "in the middle of T, kfac": (F32, {"recipe": "paper", "kfac": True, "T": 3, "damping": 0.1}),
    "in the middle of T, normalized": (F32, {"T": 3, "growing_T": False}),
    "no momentum": (F32, {"momentum": 0.0}),
    "averaged groups": (F32, {"average_groups": True}),
    "diagonal": (F32, {"structures": ("diagonal", "diagonal")}),
    "block-diagonal": (F32, {"structures": ("blockdiagonal:3", "blockdiagonal:5")}),
    "triangular": (F32, {"structures": ("tril", "triu")}),
    "toeplitz": (F32, {"structures": ("triltoeplitz", "triutoeplitz")}),
    "rank one": (F32, {"structures": ("trilbottomrightdiag", "triutopleftdiag:2")}),
    "hierarchical": (BF16, {"structures": ("hierarchical:2,3", "hierarchical:1,1")}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_an_uninterrupted_one(case: str) -> None:
    check_resumed(*CASES[case])


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("recipe", ["paper", "normalized"])
def test_resumed_after_any_number_of_steps(recipe: str, before: int) -> None:
    check_resumed(F32, {"recipe": recipe, "T": 3}, before)


def test_resumed_when_the_rows_were_all_zero_so_far() -> None:
    """A head that starts at zero sends no gradient down in the first step."""

    def make() -> nn.Module:
        network = Network()
        nn.init.zeros_(network.out.weight)
        return network

    check_resumed(F32, {"T": 3, "growing_T": False}, before=1, make=make)


def test_resumed_when_a_layer_had_no_gradient_in_some_steps() -> None:
    """Equal layers step together again, which differs by rounding alone: float64 has less of it."""

    def step(layers: nn.ModuleList, optimizer: SINGD, t: int) -> None:
        x = torch.sin(torch.arange(24.0, dtype=F64).reshape(6, 4) + t)
        for i, layer in enumerate(layers):
            x = x if i == 1 and t % 5 == 3 else torch.tanh(layer(x))
        optimizer.zero_grad()
        (x - 0.3).square().mean().backward()
        optimizer.step()

    model = nn.ModuleList([nn.Linear(4, 4, dtype=F64) for _ in range(4)])
    optimizer = SINGD(model)
    for t in range(20):
        step(model, optimizer, t)
    resumed = copy.deepcopy(model)
    other = SINGD(resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for t in range(20, 50):
        step(model, optimizer, t)
        step(resumed, other, t)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_resumed_with_a_schedule() -> None:
    data, given = batches(F32, 6), {"lr": 0.05}
    model = Network()
    optimizer = SINGD(model, **given)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def run(model: nn.Module, optimizer: SINGD, schedule: Any, data: Any) -> None:
        for batch in data:
            train(model, optimizer, [batch])
            schedule.step()

    run(model, optimizer, schedule, data[:3])
    objects = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = through_a_file({name: thing.state_dict() for name, thing in objects.items()})
    run(model, optimizer, schedule, data[3:])

    resumed = Network()
    again = SINGD(resumed, **given)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(again, 6)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    run(resumed, again, schedule, data[3:])
    assert_equal(all_numbers(model, optimizer), all_numbers(resumed, again))


def test_a_schedule_of_the_factors_is_left_out_and_kept_by_who_loads() -> None:
    def lr_cov(step: int) -> float:
        return 0.5 / (1 + step)

    check_resumed(F32, {"lr_cov": lr_cov})
    check_resumed(F32, {"lr_cov": lambda step: 0.5 / (1 + step)})
    model = Network()
    assert SINGD(model, lr_cov=lr_cov).state_dict()["param_groups"][0]["lr_cov"] is None


def test_dtypes_are_those_that_were_saved() -> None:
    """torch casts every loaded tensor to its parameter's dtype; factors must come back as saved."""
    model = Network().to(BF16)
    given = {"preconditioner_dtype": (F32, F32), "structures": ("dense", "dense")}
    optimizer = SINGD(model, **given)
    train(model, optimizer, batches(BF16, 1))
    again = SINGD(Network().to(BF16), **given)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    (entries,) = (e for p, e in again.state.items() if p is again.param_groups[0]["params"][-1])
    assert {k: e.dtype for k, e in entries.items()}["K.matrix"] == F32
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("given", [{}, {"kfac": True}], ids=["normalized", "kfac"])
@pytest.mark.parametrize(("saved_in", "resumed_in"), [(F32, BF16), (BF16, F32), (F32, F16)])
def test_resumed_in_another_dtype(
    saved_in: torch.dtype, resumed_in: torch.dtype, given: dict[str, Any]
) -> None:
    """The factors follow the weights into their dtype, and training goes on."""
    model, resumed = Network().to(saved_in), Network().to(resumed_in)
    optimizer, again = SINGD(model, **given), SINGD(resumed, **given)
    train(model, optimizer, batches(saved_in, 3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    before = copy.deepcopy(resumed)
    train(resumed, again, batches(resumed_in, 3))
    for layer in layers(again):
        kept = again.state[layer.weight]
        assert kept["momentum_buffer"].dtype == layer.dtypes[2]
        for side, dtype in zip("KC", layer.dtypes, strict=False):
            arrays = [a for name, a in kept.items() if name.split(".")[0] in (side, f"S_{side}")]
            assert {a.dtype for a in arrays} == {dtype}
        assert not torch.equal(layer.weight, before.get_parameter(layer.name))
    assert again.skipped == 0


def deep_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(deep_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(deep_equal, a, b))
    return bool(a == b)


def test_loading_neither_changes_nor_keeps_the_callers_dict() -> None:
    model = Network()
    optimizer = SINGD(model)
    train(model, optimizer, batches(F32, 2))
    saved = through_a_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    twins = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [SINGD(twin) for twin in twins]
    for again in optimizers:
        again.load_state_dict(saved)
    assert deep_equal(saved, kept)
    train(twins[0], optimizers[0], batches(F32, 3))
    assert deep_equal(saved, kept)
    assert_equal(all_numbers(twins[1], optimizers[1]), all_numbers(model, optimizer))


def test_state_is_flat_tensors_and_plain_values() -> None:
    model = Network()
    optimizer = SINGD(model)
    train(model, optimizer, batches(F32, 1))
    state = optimizer.state_dict()
    for entries in state["state"].values():
        assert all(type(key) is str and type(value) is Tensor for key, value in entries.items())
    plain = (int, float, bool, str, type(None), list, tuple)
    for group in state["param_groups"]:
        assert all(isinstance(value, plain) for value in group.values())
