"""Models of 16 bits: short steps add up as in float32, and what rounding does is repeatable."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_core import Settings, rules, settings
from singd_core.rounding import Place, Rounding
from singd_core.structures import Dense
from singd_torch import SINGD, estimate
from singd_torch.step import equal, rounding
from singd_torch.tensors import pieces

# Short steps are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.*the rate is the size of a step")

BF16 = torch.bfloat16
MODES = ["stochastic", "kahan"]


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Two equal layers, one with a bias, one without, and one on AdamW; numbers of bfloat16."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.LayerNorm(40), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8, bias=False))
    return model.bfloat16().to(dtype)


def step(model: nn.Module, optimizer: SINGD, seed: int, poison: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 24, generator=generator), torch.randint(8, (64,), generator=generator)
    optimizer.zero_grad()
    outputs = model(x.to(next(model.parameters()).dtype)).float()
    (nn.functional.cross_entropy(outputs, y) + poison * outputs.sum()).backward()
    optimizer.step()


def trained(dtype: torch.dtype = torch.bfloat16, steps: int = 8, **given: Any) -> Any:
    model = network(dtype)
    optimizer = SINGD(model, warmup=0, **given)
    for i in range(steps):
        step(model, optimizer, i)
    return model, optimizer


@torch.no_grad()
def changes(model: nn.Module) -> Tensor:
    """How far all parameters are from where they started."""
    pairs = zip(model.parameters(), network().parameters(), strict=True)
    return torch.cat([(p.float() - q.float()).flatten() for p, q in pairs])


def share(found: Tensor, expected: Tensor) -> float:
    """How much of the expected change was made: 1 on average if nothing is lost."""
    return float(found @ expected / (expected @ expected))


SHORT = {"lr": 4e-4, "fallback_lr": 4e-5}


@pytest.mark.parametrize(
    "way", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "accelerator"]
)
def test_steps_below_half_a_unit_add_up(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 steps, each a fraction of a unit of most weights, of layers and of AdamW."""
    half = way == "float16"  # whose units are an eighth
    given = {name: rate / 8 if half else rate for name, rate in SHORT.items()}
    expected = changes(trained(torch.float32, **given)[0])
    if way == "accelerator":
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    dtype = torch.float16 if half else torch.bfloat16
    found = {
        mode: share(changes(trained(dtype, rounding=mode, **given)[0]), expected)
        for mode in [*MODES, "nearest"]
    }
    assert all(abs(found[mode] - 1.0) < 0.15 for mode in MODES), found
    assert found["nearest"] < 0.6, found


def test_float32_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [trained(torch.float32, steps=4, rounding=mode)[0] for mode in ("nearest", "kahan")]
    monkeypatch.setattr(Rounding, "at", None)  # nor is a random bit made
    monkeypatch.setattr(rounding, "Row", None)
    found.append(trained(torch.float32, steps=4)[0])
    for model in found[1:]:
        assert all(map(torch.equal, model.parameters(), found[0].parameters()))


def equal_share(model: nn.Module, other: nn.Module) -> float:
    same = [(p == q).flatten() for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    return float(torch.cat(same).float().mean())


@pytest.mark.parametrize(
    "way", ["alone", "accelerator", pytest.param("pieces", marks=pytest.mark.slow)]
)
def test_bits_do_not_depend_on_how_layers_are_grouped(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what products in another order change."""
    expected = trained(steps=2, **SHORT)[0]
    if way == "alone":
        monkeypatch.setattr(equal, "_LARGEST", 0)
    elif way == "accelerator":
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    else:
        monkeypatch.setattr(rounding, "_PIECE", 100)
        monkeypatch.setattr(equal, "_LARGEST", 0)
    assert equal_share(trained(steps=2, **SHORT)[0], expected) > 0.98
    assert equal_share(trained(steps=2, seed=1, **SHORT)[0], expected) < 0.95


@pytest.mark.parametrize("rule", ["kahan", "stochastic"])
@pytest.mark.parametrize("masked", [False, True], ids=["host", "accelerator"])
def test_a_skipped_step_changes_nothing(
    masked: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    model, optimizer = trained(steps=3, rounding=rule, weight_decay=0.1)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])

    def skipped() -> int:
        step(model, optimizer, 3, poison=float("nan"))
        return optimizer.skipped

    with pytest.warns(UserWarning, match="changed nothing"):
        assert skipped() == 1
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    for index, own in optimizer.state_dict()["state"].items():
        assert all(torch.equal(own[key], value) for key, value in state[index].items())


def test_a_weight_with_its_compensation_is_nearly_that_of_float32() -> None:
    expected = changes(trained(torch.float32, **SHORT)[0])
    model, optimizer = trained(rounding="kahan", **SHORT)
    costs = [optimizer.state[p]["compensation"] for p in model.parameters()]
    assert [(c.dtype, c.shape) for c in costs] == [(p.dtype, p.shape) for p in model.parameters()]
    alone, cost = changes(model), torch.cat([c.float().flatten() for c in costs])
    errors = [float((x - expected).norm() / expected.norm()) for x in (alone + cost, alone)]
    assert 10.0 * errors[0] < errors[1] < 1.0, errors


def test_moments_of_bfloat16_are_kept_in_float32() -> None:
    """An average over 1000 steps of squares in 8 bits would never fall."""
    model, optimizer = trained(steps=1)
    moments = optimizer.state[model[3].weight]
    assert {moments[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_tables_count_compensations() -> None:
    sizes = [estimate(network(), rounding=mode).total for mode in ("kahan", "stochastic")]
    assert sizes[0] - sizes[1] == 2 * sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("whole", [(12, 5), (6, 4, 5)])
@torch.no_grad()
def test_a_part_of_a_parameter_is_rounded_as_in_the_whole(whole: tuple[int, ...]) -> None:
    """As processes have parts: of rows, of columns, and beside other parameters."""

    def rounded(named: dict[str, Tensor], *places: Place) -> list[Tensor]:
        params = [nn.Parameter(torch.empty_like(x, dtype=torch.bfloat16)) for x in named.values()]
        row = rounding.Row(params, list(named), ["weight"] * len(named), places)
        row.write(torch.cat([x.flatten() for x in named.values()]), Settings(), 3, None, None)
        return [p.data for p in params]

    x = torch.randn(whole)
    _, expected = rounded({"other": torch.randn(7), "weight": x}, Place(), Place())
    starts = [0] * len(whole)
    rows, corner = x[4:6], x[tuple(slice(2) for _ in whole)]
    (found,) = rounded({"weight": rows}, Place(4 * rows[0].numel()))
    assert torch.equal(found, expected[4:6])
    (found,) = rounded({"weight": corner}, Place.of(whole, starts))
    assert torch.equal(found, expected[tuple(slice(2) for _ in whole)])


def test_a_graph_would_repeat_its_random_bits() -> None:
    with pytest.raises(ValueError, match='choose rounding="kahan"'):
        SINGD(network(), capturable=True)
    SINGD(network(torch.float32), capturable=True)
    SINGD(network(), capturable=True, rounding="kahan")


@pytest.mark.parametrize("masked", [False, True], ids=["host", "accelerator"])
def test_momenta_have_the_dtype_that_was_chosen(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = changes(trained(torch.float32)[0])
    if masked:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    model, optimizer = trained(torch.float32, momentum_dtype=torch.bfloat16)
    found = changes(model)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    state = optimizer.state_dict()
    assert state["state"][0]["momentum_buffer"].dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = SINGD(network(torch.float32), momentum_dtype=torch.bfloat16)
    again.load_state_dict(state)
    assert again.state[next(iter(again.state))]["momentum_buffer"].dtype == torch.bfloat16
    layers = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("3."))
    sizes = [estimate(network(torch.float32), momentum_dtype=d).total for d in (None, BF16)]
    assert sizes[0] - sizes[1] == 2 * layers


def test_momenta_follow_a_model_that_is_cast_whose_factors_have_dtypes_of_their_own() -> None:
    model = network(torch.float32)
    optimizer = SINGD(model, preconditioner_dtype=(torch.float32, torch.float32))
    step(model, optimizer, 0)
    model.double()
    step(model, optimizer, 1)
    own = optimizer.state[model[0].weight]  # type: ignore[index]
    assert {v.dtype for name, v in own.items() if name.startswith("K.")} == {torch.float32}
    assert own["momentum_buffer"].dtype == torch.float64


def test_parameters_of_16_bits_that_come_in_turns_are_each_their_own() -> None:
    norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2)).bfloat16()
    optimizer = SINGD(norms, warmup=0, fallback_lr=0.1)
    for i in range(4):
        used, rests = norms[i % 2], norms[1 - i % 2]
        before = copy.deepcopy((used, rests))
        optimizer.zero_grad()
        (used(torch.randn(5, 6).bfloat16()).float() - 2.0).square().mean().backward()
        optimizer.step()
        assert not any(map(torch.equal, used.parameters(), before[0].parameters()))
        assert all(map(torch.equal, rests.parameters(), before[1].parameters()))


def test_one_product_with_factors_of_16_bits_is_as_exact_as_they_are() -> None:
    """Their squares would be rounded too, which is more than the smallest eigenvalues of these."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    R, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    K = Dense((Q * torch.logspace(0, -3, 32) @ R).to(torch.bfloat16))
    C = Dense(torch.eye(64, dtype=torch.bfloat16))
    start = rules.start((Dense, Dense), ((), 64, 32), settings("paper"), C.like, C.like)
    factors = dataclasses.replace(start, K=K, C=C)
    exact = K.matrix.double() @ K.matrix.double().T
    g = torch.randn(64, 32, generator=generator) @ torch.linalg.inv(exact).float()
    g /= g.abs().max()
    found, expected = factors.precondition(g).double(), g.bfloat16().double() @ exact
    assert torch.linalg.norm(found - expected) < 0.02 * torch.linalg.norm(expected)
