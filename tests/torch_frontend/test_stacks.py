"""Equal layers step as one: what that changes is the number of calls, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from watched import layers

from singd_core.layers import Convolution
from singd_torch import SINGD
from singd_torch.capture import queue
from singd_torch.layers import rows
from singd_torch.step import bundle, equal


class Parallel(nn.Module):
    """Equal layers side by side. Each call may leave some out."""

    def __init__(self, make: Callable[[], nn.Module], number: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList([make() for _ in range(number)])
        self.used = [True] * number
        self.rows = [None] * number

    def forward(self, x: Tensor) -> Tensor:
        each = zip(self.branches, self.used, self.rows, strict=True)
        outputs = [m(x[:rows]).tanh().mean(0) for m, used, rows in each if used]
        return torch.stack(outputs).square().sum()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (8, 5)),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (8, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "attention": (Attention, (3, 4, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (3, 4, 3, 3)),
}
STRUCTURES = ["dense", "diagonal", "blockdiagonal:3", "hierarchical:1,2", "triltoeplitz"]


def trained(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    change: Callable[[int, Parallel], None] = lambda step, model: None,
    steps: int = 5,
    **settings: object,
) -> tuple[Parallel, SINGD]:
    torch.manual_seed(0)
    model = Parallel(make).double()
    optimizer = SINGD(model, **settings)  # type: ignore[arg-type]
    for step in range(steps):
        change(step, model)
        optimizer.zero_grad()
        model(torch.randn(shape, dtype=torch.float64)).backward()
        optimizer.step()
    return model, optimizer


def together(optimizer: SINGD) -> int:
    """The most layers whose factors are in the same memory, as those are that step as one."""
    places = Counter(
        kept[next(name for name in kept if name.startswith("K."))].untyped_storage().data_ptr()
        for kept in optimizer.state.values()
        if "averages.k" in kept
    )
    return max(places.values())


@pytest.fixture(autouse=True)
def no_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let unequal layers step for themselves."""
    monkeypatch.setattr(bundle, "_SEVERAL", math.inf)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each layer be measured and step for itself."""
    monkeypatch.setattr(equal, "_LARGEST", 0)
    monkeypatch.setattr(queue, "SMALL", 0)


def same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_equal_layers_step_as_they_do_alone(
    name: str, structure: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"structures": (structure, structure), "recipe": recipe, "weight_decay": 0.1, "T": 2}
    model, optimizer = trained(*MODELS[name], **settings)
    assert together(optimizer) == 3
    alone(monkeypatch)
    other, optimizer = trained(*MODELS[name], **settings)
    assert together(optimizer) == 1
    same(model, other)


def test_kfac_steps_equal_layers_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(*MODELS["linear"], kfac=True)
    alone(monkeypatch)
    same(model, trained(*MODELS["linear"], kfac=True)[0])


def leave_out(step: int, model: Parallel) -> None:
    model.used[1] = step != 1


def other_rows(step: int, model: Parallel) -> None:
    model.rows[2] = 5 if step == 1 else None  # type: ignore[call-overload]


def freeze(step: int, model: Parallel) -> None:
    model.branches[0].weight.requires_grad_(step != 2)


def replace_the_bias_gradient(step: int, model: Parallel) -> None:
    model.branches[0].bias.requires_grad_(step != 2)


@pytest.mark.parametrize("change", [leave_out, other_rows, freeze, replace_the_bias_gradient])
def test_layers_that_differ_for_once(
    change: Callable[[int, Parallel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained(*MODELS["linear"], change=change)
    alone(monkeypatch)
    same(model, trained(*MODELS["linear"], change=change)[0])


def test_a_checkpoint_does_not_know_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(*MODELS["linear"], steps=3)
    saved = optimizer.state_dict()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn(8, 5, dtype=torch.float64)

    def go_on(model: Parallel, optimizer: SINGD) -> Parallel:
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        return model

    stacked = go_on(*trained(*MODELS["linear"], steps=0))
    again = go_on(model, optimizer)
    alone(monkeypatch)
    same(stacked, again)
    same(stacked, go_on(*trained(*MODELS["linear"], steps=0)))


def test_a_moved_model_is_stacked_anew() -> None:
    def cast(step: int, model: Parallel) -> None:
        if step == 2:
            model.float()
            model.forward = lambda x: Parallel.forward(model, x.float())  # type: ignore[method-assign]

    _, optimizer = trained(*MODELS["linear"], change=cast)
    assert together(optimizer) == 3
    factors = [
        a for own in optimizer.state.values() for n, a in own.items() if n[:2] in ("K.", "C.")
    ]
    assert {a.dtype for a in factors} == {torch.float32}


def test_rows_of_several_backward_passes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Parallel:
        torch.manual_seed(0)
        model = Parallel(MODELS["linear"][0]).double()
        optimizer = SINGD(model)
        for sizes in ((8, 8), (3, 8), (8, 3, 5)):
            for n in sizes:
                model(torch.randn(n, 5, dtype=torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    model = run()
    monkeypatch.setattr(queue, "_MOST", 60)  # some are measured with others, some alone
    same(model, run())
    alone(monkeypatch)
    same(model, run())


def test_rows_that_wait_do_not_change_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Parallel:
        torch.manual_seed(0)
        model = Parallel(MODELS["no bias"][0]).double()
        optimizer = SINGD(model)
        for _ in range(3):
            x = torch.randn(8, 5, dtype=torch.float64)
            model(x).backward()
            x.zero_()
            optimizer.step()
            optimizer.zero_grad()
        return model

    model = run()
    alone(monkeypatch)
    same(model, run())


def test_layers_whose_biases_are_in_other_groups_are_not_equal() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    groups = [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias], "lr": 0.0},
        {"params": [model[2].bias], "lr": 0.1},
    ]
    optimizer = SINGD(model, groups)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, True]


def test_a_layer_that_leaves_a_stack_holds_no_memory_of_it() -> None:
    def one_more_idle(step: int, model: Parallel) -> None:
        model.used = [i >= step for i in range(len(model.used))]

    _, optimizer = trained(*MODELS["linear"], change=one_more_idle, steps=2)
    for entries in optimizer.state.values():
        for tensor in entries.values():
            assert tensor.untyped_storage().nbytes() <= 2 * tensor.numel() * tensor.itemsize


def test_a_momentum_that_is_written_to_the_state_is_taken_up() -> None:
    model, optimizer = trained(*MODELS["linear"], steps=2)
    other, other_optimizer = trained(*MODELS["linear"], steps=2)
    for p in model.parameters():
        if "momentum_buffer" in optimizer.state[p]:
            new = torch.zeros_like(optimizer.state[p]["momentum_buffer"])
            optimizer.state[p]["momentum_buffer"] = new
    for p in other.parameters():
        if "momentum_buffer" in other_optimizer.state[p]:
            other_optimizer.state[p]["momentum_buffer"].zero_()
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        each(torch.ones(8, 5, dtype=torch.float64)).backward()
        its_optimizer.step()
    same(model, other)


def test_a_pass_without_a_step_leaves_no_entries_in_the_state() -> None:
    model = Parallel(MODELS["linear"][0])
    optimizer = SINGD(model)
    model(torch.randn(8, 5)).backward()
    assert all(layer.pending for layer in layers(optimizer))
    optimizer.zero_grad()
    assert not optimizer.state


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["convolution", "groups"])
@pytest.mark.parametrize("loss_average", ["batch", None])
def test_patches_taken_piece_by_piece_are_those_of_the_whole_batch(
    name: str, kfac_approx: str, loss_average: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"T": 1, "rows": math.inf, "kfac_approx": kfac_approx, "loss_average": loss_average}
    model, _ = trained(*MODELS[name], **settings)
    monkeypatch.setattr(rows, "_PATCHES", 0)
    taken: list[int] = []
    inputs = Convolution.inputs

    def counted(self: Convolution, x: Tensor, **given: object) -> object:
        if given["kfac_approx"] == kfac_approx:  # else it is asked whether rows tell the gradient
            taken.append(len(x))
        return inputs(self, x, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Convolution, "inputs", counted)
    same(model, trained(*MODELS[name], **settings)[0])
    assert set(taken) == ({1} if kfac_approx == "expand" else {3})
