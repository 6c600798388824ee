"""What a step leaves alone, and rows that come late, are masked, or belong to a tied table."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd_torch import SINGD

STRUCTURES: dict[str, tuple[str, str]] = {
    "dense": ("dense", "dense"),
    "diagonal": ("diagonal", "diagonal"),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [(6, 4), (1024, 512)], ids=["small", "large"])
@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_a_step_leaves_gradients_as_backward_made_them(
    recipe: str, sizes: tuple[int, int], bias: bool, momentum: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(*sizes, bias=bias)
    given = {"structures": STRUCTURES["diagonal"], "momentum": momentum, "weight_decay": 0.1}
    optimizer = SINGD(model, recipe=recipe, **given)
    for _ in range(2):  # with a momentum that there was not before
        optimizer.zero_grad()
        model(torch.randn(16, sizes[0])).square().mean().backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(
            torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_default_device_that_is_not_the_models_changes_nothing(dtype: torch.dtype) -> None:
    def trained(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.LayerNorm(200), nn.Linear(200, 100)).to(dtype)
        x = torch.randn(16, 6).to(dtype)
        with torch.device(device):
            optimizer = SINGD(model)
            for _ in range(3):
                optimizer.zero_grad()
                model(x).float().square().mean().backward()
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.diagnostics()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, trained("meta"), trained("cpu")))


def test_a_layer_that_is_used_late_is_preconditioned_at_once() -> None:
    torch.manual_seed(0)
    first, late = nn.Linear(4, 3), nn.Linear(4, 3)
    model = nn.ModuleList([first, late])
    optimizer = SINGD(model, T=10, growing_T=False, structures=STRUCTURES["diagonal"])
    for step in range(4):
        optimizer.zero_grad()
        used = (first, late) if step == 3 else (first,)
        sum(layer(torch.randn(8, 4)).square().mean() for layer in used).backward()
        optimizer.step()
    state = optimizer.state[late.weight]
    assert float(state["averages.k"]) == 1.0


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_sample_without_any_position_left_by_the_mask_destroys_nothing(kfac_approx: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = SINGD(model, kfac_approx=kfac_approx)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    optimizer.mask_rows(mask)
    (model(torch.randn(2, 3, 4)) * mask[..., None]).square().mean().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert optimizer.skipped == 0
    assert not torch.equal(model.weight, before)
    assert all(
        torch.isfinite(v).all()
        for s in optimizer.state.values()
        for v in s.values()
        if v is not None
    )


def test_a_look_up_in_a_table_tied_to_a_layer_with_a_bias_does_not_see_the_bias() -> None:
    """Output gradients of the look-up lie along the first unit alone; the layer's inputs are 0."""
    table, head = nn.Embedding(5, 3), nn.Linear(3, 5)
    head.weight = table.weight
    given: dict[str, Any] = {"structures": STRUCTURES["diagonal"], "kfac_like": True}
    optimizer = SINGD(nn.ModuleList([table, head]), recipe="paper", lr_cov=0.1, **given)
    found = table(torch.tensor([0, 1, 1, 4]))
    (found[:, 0].sum() + head(torch.zeros(4, 3)).square().sum()).backward()
    optimizer.step()
    K = optimizer.state[head.weight]["K.diag"]
    assert K.shape == (4,)
    assert K[1] == K[2]
    assert K[0] < K[1] - 1e-3  # of the look-up
    assert K[3] < K[1] - 1e-3  # of the bias


EMPTY: dict[str, tuple[Any, Any]] = {
    "no inputs": (lambda: nn.Linear(0, 3), torch.zeros(8, 0)),
    "no outputs": (lambda: nn.Linear(4, 0), torch.zeros(8, 4)),
    "no bias": (lambda: nn.Linear(0, 3, bias=False), torch.zeros(8, 0)),
    "no features": (lambda: nn.Embedding(5, 0), torch.arange(5)),
    "no channels": (lambda: nn.Conv1d(0, 2, 1), torch.zeros(8, 0, 5)),
    "no channels in windows": (lambda: nn.Conv2d(0, 2, 3, padding=1), torch.zeros(8, 0, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("case", EMPTY)
def test_layers_without_numbers_are_left_alone(case: str) -> None:
    make, x = EMPTY[case]
    layer = make()
    model = nn.ModuleList([layer, nn.Linear(2, 2)])
    optimizer = SINGD(model)
    before = [p.detach().clone() for p in model[1].parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x).sum() + model[1](torch.ones(3, 2)).square().sum()).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(not torch.equal(p, q) for p, q in zip(model[1].parameters(), before, strict=True))


RATES = {
    "lr": 0.01,
    "momentum": 0.5,
    "damping": 0.1,
    "alpha1": 0.5,
    "weight_decay": 0.1,
    "lr_cov": 0.1,
    "fallback_lr": 0.1,
    "fallback_weight_decay": 0.1,
}


def trained(recipe: str, name: str, rate: Any) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = SINGD(model, recipe=recipe, **{name: rate})
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


class Unread(Tensor):
    """Nobody asks whether it is 0: on a device that would be waited for."""

    def __bool__(self) -> bool:
        asked = sys._getframe(1).f_code.co_name
        assert asked == "advance", asked  # whether a step is finite is asked, of the host
        return super().__bool__()


@pytest.mark.parametrize("recipe", ["normalized", "paper"])
@pytest.mark.parametrize("name", RATES)
def test_rates_that_are_tensors_make_the_steps_of_numbers(name: str, recipe: str) -> None:
    rate = torch.tensor(RATES[name], dtype=torch.float64)
    for p, q in zip(trained(recipe, name, rate), trained(recipe, name, RATES[name]), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    with fresh_memory_is_nan():
        unread = trained(recipe, name, rate.as_subclass(Unread))
    for p, q in zip(unread, trained(recipe, name, rate), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Partly(nn.Module):
    """Tells the parameters of some of its modules, by methods of the arguments of older torch."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(3, 3), nn.Linear(3, 2)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        return self.trained.named_parameters(prefix, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x).tanh())  # type: ignore[no-any-return]


def test_a_model_may_tell_its_parameters_by_a_method_of_its_own() -> None:
    model = Partly()
    before, optimizer = copy.deepcopy(model.state_dict()), SINGD(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert moved == ["trained.weight", "trained.bias"]
    assert "without rows" not in repr(optimizer)


def test_layers_in_one_memory_change_it_each() -> None:
    """As `data` ties them: torch's optimizers step along the gradients of both, one by one."""
    moved = []
    for trained in ((0,), (2,), (0, 2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        first, second = model[0], model[2]
        second.weight.data, second.bias.data = first.weight.data, first.bias.data
        start = first.weight.detach().clone(), first.bias.detach().clone()
        params = [p for i in trained for p in model[i].parameters()]
        optimizer = SINGD(model, params, warmup=0, weight_decay=0.0)
        model(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        assert torch.equal(first.weight, second.weight)
        moved.append([p.detach() - q for p, q in zip(first.parameters(), start, strict=True)])
    for one, other, both in zip(*moved, strict=True):
        torch.testing.assert_close(one + other, both)
