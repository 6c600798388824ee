"""On an accelerator `compile_step` compiles whole steps, shown on the CPU in the place of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_capturable import CASES, Network
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.tensors import pieces


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    torch.compiler.reset()


class Counted:
    """A compiler that counts its graphs, and leaves them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def small() -> nn.Module:
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(model, Network):
        return torch.randint(9, (6, 5)), torch.randint(3, (6,))
    return torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))


def train(
    make: Callable[[], nn.Module],
    given: dict[str, Any],
    steps: int = 20,
    before: Callable[[int, nn.Module, SINGD], None] = lambda step, model, optimizer: None,
) -> tuple[nn.Module, SINGD]:
    torch.manual_seed(0)
    model = make()
    optimizer = SINGD(model, **({"T": 5, "growing_T": False, "warmup": 3} | given))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for step in range(steps):
        x, y = batch(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before(step, model, optimizer)
        optimizer.step()
        schedule.step()
    return model, optimizer


def assert_equal(model: nn.Module, expected: nn.Module, rtol: float = 1e-10) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=rtol, atol=1e-2 * rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def broken(step: int, model: nn.Module, optimizer: SINGD) -> None:
    if step in (12, 15):  # one between refreshes, and one at a refresh
        next(model.parameters()).grad.view(-1)[0] = torch.nan


@pytest.mark.parametrize("given", [{}, pytest.param({"momentum": 0.0}, marks=pytest.mark.slow)])
def test_a_kind_of_step_is_one_graph_and_the_step_it_was(given: dict[str, Any]) -> None:
    counted = Counted()
    model, optimizer = train(small, given | {"compile_step": {"backend": counted}}, 22, broken)
    assert counted.graphs == 3  # of a refresh, of the step before it, and of all others
    with torch._dynamo.config.patch(error_on_recompile=True):
        expected, other = train(small, given, 22, broken)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert optimizer.skipped == other.skipped == 2
    assert_equal(model, expected)


@pytest.mark.slow
def test_a_tensor_that_is_not_finite_stops_a_graph_too() -> None:
    def with_tensor(**given: Any) -> tuple[nn.Module, SINGD]:
        rate = torch.tensor(0.1)

        def spoil(step: int, model: nn.Module, optimizer: SINGD) -> None:
            rate.fill_(torch.nan if step in (12, 15) else 0.1)

        return train(small, given | {"weight_decay": 0.1, "fallback_lr": rate}, 18, spoil)

    counted = Counted()
    model, optimizer = with_tensor(compile_step={"backend": counted})
    assert counted.graphs == 3
    expected, other = with_tensor()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert optimizer.skipped == other.skipped == 2
    assert_equal(model, expected, 1e-6)  # the tensor is of float32


@pytest.mark.parametrize(
    ("given", "combined"),
    [({}, True), ({"dynamic": None}, True), ({"mode": "default"}, None), ({"options": {}}, None)],
)
def test_small_kernels_are_launched_as_one_unless_the_compiler_is_told(
    given: dict[str, Any], combined: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda graph, **with_: told.append(with_) or graph)
    train(small, {"compile_step": given or True}, 8)
    assert told
    for own in told:
        assert own.get("options", {}).get("combo_kernels") is combined
        assert own.items() >= given.items()
        assert own["fullgraph"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_of_all_layers_are_those_without_graphs(case: str) -> None:
    counted = Counted()
    given = CASES[case] | {"compile_step": {"backend": counted}}
    model, optimizer = train(Network, given, 24, broken)
    assert counted.graphs == 3
    expected, other = train(Network, CASES[case], 24, broken)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert optimizer.skipped == other.skipped == 2
    assert_equal(model, expected, 1e-3)  # float32, after 24 steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated")  # of torch's own compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiler_of_torch_takes_them(dtype: torch.dtype) -> None:
    given = {"rounding": "kahan", "warmup": 0}

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)

    def trained(**more: Any) -> nn.Module:
        torch.manual_seed(0)
        model = made()
        optimizer = SINGD(model, T=2, growing_T=False, **given, **more)
        for _ in range(8):
            x, y = torch.randn(6, 5, dtype=dtype), torch.randint(3, (6,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
        return model

    units = 8 * torch.finfo(dtype).eps  # of what a step rounds, which compiled code does elsewhere
    for p, q in zip(trained(compile_step=True).parameters(), trained().parameters(), strict=True):
        assert (p - q).norm() < units * q.norm()


def frozen(step: int, model: nn.Module, optimizer: SINGD) -> None:
    if step == 8:
        model[2].weight.requires_grad_(False)
        model[2].weight.grad = None
    if step == 17:
        model[2].weight.requires_grad_(True)


def loaded(step: int, model: nn.Module, optimizer: SINGD) -> None:
    if step == 9:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def told(step: int, model: nn.Module, optimizer: SINGD) -> None:
    if step == 9:
        optimizer.diagnostics()


def scaled(step: int, model: nn.Module, optimizer: SINGD) -> None:
    scale = torch.full((), 2.0 ** (step % 3), dtype=torch.float64)
    for p in model.parameters():
        p.grad.mul_(scale)
    optimizer.set_current_grad_scale(scale)


def rate(step: int, model: nn.Module, optimizer: SINGD) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)


@pytest.mark.slow
@pytest.mark.parametrize("before", [frozen, loaded, told, scaled, rate])
def test_whatever_happens_between_steps(before: Callable[..., None]) -> None:
    model, optimizer = train(small, {"compile_step": {"backend": "eager"}}, 26, before)
    expected, _ = train(small, {}, 26, before)
    assert_equal(model, expected)
    assert optimizer.skipped == 0


@pytest.mark.slow
def test_refreshes_have_a_graph_when_the_gaps_between_them_have_grown() -> None:
    counted, given = Counted(), {"T": 2, "growing_T": True}
    model, _ = train(small, given | {"compile_step": {"backend": counted}}, 50)
    assert_equal(model, train(small, given, 50)[0])
    assert counted.graphs == 4  # a step refreshes, or is before one that does, or both, or neither


def cycled(step: int, model: nn.Module, optimizer: SINGD) -> None:
    group, value = optimizer.param_groups[0], 0.9 - 0.01 * step
    if isinstance(group["momentum"], Tensor):
        group["momentum"].fill_(value)
    else:
        group["momentum"] = value


def test_a_schedule_of_another_setting_is_warned_of() -> None:
    counted = Counted()
    with pytest.warns(UserWarning, match="more than 16 kinds, and further ones run uncompiled"):
        train(small, {"compile_step": {"backend": counted}}, 20, cycled)
    assert counted.graphs == 0


@pytest.mark.slow
def test_a_tensor_that_a_schedule_changes_in_place_compiles_nothing_again() -> None:
    counted, momentum = Counted(), torch.full((), 0.9, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(small, {"compile_step": {"backend": counted}, "momentum": momentum}, 20, cycled)
    assert counted.graphs == 3


@pytest.mark.slow
def test_layers_that_come_and_go_change_the_share_of_the_others_in_graphs_too() -> None:
    """Of more than twelve matrices each has a share of the size (5.10b)."""

    def trained(**given: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(24)]).double()
        first, last = list(model.parameters())[:12], list(model.parameters())[12:]
        groups = [{"params": first}, {"params": last}]
        own: dict[str, Any] = {"T": 5, "growing_T": False, "warmup": 0, "lr": 0.03}
        optimizer = SINGD(model, groups, **own | given)
        for step in range(24):
            for p in last:
                p.requires_grad_(step // 4 % 2 == 0)
            optimizer.zero_grad()
            model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return model

    assert_equal(trained(compile_step={"backend": Counted()}), trained(), rtol=1e-8)
