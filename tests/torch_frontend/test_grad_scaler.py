"""torch.amp.GradScaler: the scale is undone in the gradients and in the captured rows."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.tensors import pieces

SCALE = 2.0**10  # a power of two: scaling with it rounds nothing, so results are equal in every bit


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def batches(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(n)]


def scaler(**given: Any) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, **given)


def plainly(model: nn.Module, data: list[Any], **given: Any) -> SINGD:
    optimizer = SINGD(model, **given)
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return optimizer


def scaled(
    model: nn.Module,
    data: list[Any],
    before_step: Callable[[SINGD, Any], None] = lambda optimizer, scaler: None,
    **given: Any,
) -> SINGD:
    optimizer, amp = SINGD(model, **given), scaler(growth_interval=2)
    for batch in data:
        optimizer.zero_grad()
        amp.scale(loss_of(model, batch)).backward()
        before_step(optimizer, amp)
        amp.step(optimizer)
        amp.update()
    assert amp.get_scale() > SCALE  # it grew on the way
    return optimizer


def unscaled(optimizer: SINGD, amp: Any) -> None:
    amp.unscale_(optimizer)
    optimizer.set_current_grad_scale(amp.get_scale())


def assert_same(model: nn.Module, a: SINGD, twin: nn.Module, b: SINGD) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in a.state[p].items():
            assert torch.equal(value, b.state[q][name]), name


GIVEN = [{}, {"recipe": "paper", "T": 2}, {"kfac": True}]


@pytest.mark.parametrize("given", GIVEN, ids=["normalized", "paper", "kfac"])
@pytest.mark.parametrize("before_step", [lambda o, s: None, unscaled], ids=["", "unscale_"])
def test_scaled_training_is_unscaled_training(before_step: Any, given: dict[str, Any]) -> None:
    model, data = network(), batches()
    twin = copy.deepcopy(model)
    plain, amp = plainly(model, data, **given), scaled(twin, data, before_step, **given)
    assert_same(model, plain, twin, amp)


def test_clipping_between_unscale_and_step_is_possible() -> None:
    def clip(optimizer: SINGD, amp: Any) -> None:
        unscaled(optimizer, amp)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, 1e-3)
        assert norm < 100.0  # of the loss itself, not of the scaled one

    scaled(network(), batches(), clip)


def test_after_unscaling_the_scaler_is_asked_for_its_scale() -> None:
    """`unscale_`, `clip_grad_norm_`, `step`, `update`: the same step as without a scaler."""
    model, data = network(), batches(3)
    twin = copy.deepcopy(model)
    ours, plain, amp = SINGD(model), SINGD(twin), scaler()
    for batch in data:
        for net, optimizer in ((model, ours), (twin, plain)):
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            (amp.scale(loss) if net is model else loss).backward()
        amp.unscale_(ours)
        for net in (model, twin):
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        amp.step(ours)
        amp.update()
        plain.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_gradients_of_float16_weights_are_unscaled_in_float32() -> None:
    """Divided in float16, those for which there is a scale at all would be 0."""
    model = nn.Linear(6, 4).half()
    before = model.weight.detach().clone()
    optimizer, amp = SINGD(model), scaler()
    amp.scale(model(torch.randn(8, 6).half()).float().mean() * 2e-8).backward()
    assert model.weight.grad is not None
    assert model.weight.grad.any()
    assert not (model.weight.grad / SCALE).any()
    amp.step(optimizer)
    assert not torch.equal(model.weight, before)


def test_an_unknown_scale_is_an_error() -> None:
    model = network()
    optimizer = SINGD(model)
    loss_of(model, batches(1)[0]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.zeros(())  # as a scaler sets it, but no scaler is there to ask
    with pytest.raises(RuntimeError, match="set_current_grad_scale"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("before_step", [lambda o, s: None, unscaled], ids=["", "unscale_"])
def test_overflow_skips_the_step_and_lowers_the_scale(before_step: Any) -> None:
    model, data = network(), batches(3)
    twin = copy.deepcopy(model)
    plain = plainly(model, [data[0], data[2]], warmup=0)  # which counts the steps

    optimizer, amp = SINGD(twin, warmup=0), scaler()
    for i, batch in enumerate(data):
        optimizer.zero_grad()
        amp.scale(loss_of(twin, batch) * (float("inf") if i == 1 else 1.0)).backward()
        before_step(optimizer, amp)
        if i == 1:
            with pytest.warns(UserWarning, match="NaN or infinite"):
                amp.step(optimizer)
        else:
            amp.step(optimizer)
        amp.update()
    assert optimizer.skipped == 1
    assert amp.get_scale() == SCALE / 2
    assert_same(model, plain, twin, optimizer)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_an_overflow_that_was_made_finite_again_skips_the_step(
    rows: bool, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_host:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    model = network()
    optimizer, amp = SINGD(model if rows else model.parameters()), scaler()
    for i in range(12):
        optimizer.zero_grad()
        overflows = i % 3 == 2
        amp.scale(loss_of(model, batches(1)[0]) * (float("inf") if overflows else 1.0)).backward()
        amp.unscale_(optimizer)
        for p in model.parameters():
            p.grad.nan_to_num_(0.5, 0.5, 0.5)
        before = [p.clone() for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            amp.step(optimizer)
        amp.update()
        moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
        assert all(moved) if not overflows else not any(moved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert int(optimizer.skipped) == 4


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_a_told_scale_is_divided_out_and_holds_for_one_step(
    kind: Any, by_hand: bool, recipe: str
) -> None:
    """As with `singd` 0.0.5, of gradients and rows; or of rows, where gradients are without it."""
    model, data = network(), batches(3)
    twin = copy.deepcopy(model)
    plain = plainly(model, data, recipe=recipe, T=1)
    optimizer = SINGD(twin, recipe=recipe, T=1)
    for batch, scale in zip(data, (SCALE, 4 * SCALE, 1.0), strict=True):
        optimizer.zero_grad()
        loss_of(twin, batch).mul(scale).backward()
        if by_hand:
            for p in twin.parameters():
                p.grad /= scale
        if scale != 1.0:
            optimizer.set_current_grad_scale(kind(scale), unscaled=by_hand)
        optimizer.step()
    assert_same(model, plain, twin, optimizer)


def test_what_a_scaler_has_found_elsewhere_stops_a_step_of_its_scale() -> None:
    """As where other processes have other parts of the model."""
    model, data = network(), batches(2)
    optimizer: Any = plainly(model, data[:1])
    twin, own = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    loss_of(model, data[1]).mul(2.0).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        optimizer.step()
    assert_same(model, optimizer, twin, own)
    assert optimizer.skipped == 1


def test_float16_autocast_trains_with_the_full_recipe() -> None:
    """The first scale overflows float16: some steps are skipped, and the others train."""
    model, amp = network(), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer, losses, (batch,) = SINGD(model), [], batches(1)
    before = copy.deepcopy(model)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, batch)
        amp.scale(loss).backward()
        amp.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        amp.step(optimizer)
        amp.update()
        losses.append(loss.item())

    with pytest.warns(UserWarning, match="the step changed nothing"):
        step()
    for _ in range(60):
        step()
    assert 1 < optimizer.skipped < 40
    assert amp.get_scale() == 2.0 ** (40 - optimizer.skipped)
    assert losses[-1] < 0.5 * losses[0]
    assert not any(map(torch.equal, model.parameters(), before.parameters()))


@pytest.mark.parametrize("masked", [False, True], ids=["host", "accelerator"])
def test_the_scale_grows_falls_and_grows_again_as_without_singd(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the scaler does in 12 steps is what it does for torch's AdamW on the same losses."""
    if masked:
        monkeypatch.setattr(pieces, "on_host", lambda x: False)
    scales: list[list[float]] = []
    for make in (SINGD, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)):
        model, amp = network(), scaler(growth_interval=3)
        optimizer: Any = make(model)
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for i, batch in enumerate(batches(12)):
                optimizer.zero_grad()
                amp.scale(loss_of(model, batch) * (float("inf") if i in (4, 5) else 1.0)).backward()
                amp.step(optimizer)
                amp.update()
                found.append(amp.get_scale() / SCALE)
        scales.append(found)
    assert scales[0] == scales[1] == [1.0, 1.0, 2.0, 2.0, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0]
