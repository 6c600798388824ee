"""Models that a script freezes around its steps, as training loops of GANs do."""

import warnings
from collections.abc import Callable

import pytest
import recent
import torch
from torch import Tensor, nn

from singd_torch import SINGD

STEPS = 9


class Function(nn.Linear):
    """A layer whose weight a function is handed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * 0.5


def several(kind: type[nn.Linear], n: int) -> nn.Module:
    layers = [part for _ in range(n) for part in (kind(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, kind(6, 3))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "modules": (lambda: several(nn.Linear, 2), lambda model: model),
    "many matrices": (lambda: several(nn.Linear, 14), lambda model: model),
    "functions": (lambda: several(Function, 2), lambda model: model),
    "compiled": (lambda: several(nn.Linear, 2), compiled),
}


def trained(kind: str, order: str) -> list[Tensor]:
    """The weights and the factors after some steps, with the freezing in this order."""
    make, wrapped = KINDS[kind]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make().double()
    optimizer, called = SINGD(model, T=2, growing_T=False), wrapped(model)
    for _ in range(STEPS):
        x = torch.randn(8, 6, dtype=torch.float64)
        model.requires_grad_(order != "zero_grad while frozen")
        optimizer.zero_grad()
        model.requires_grad_(True)
        called(x).square().sum(1).mean().backward()
        model.requires_grad_(order != "step while frozen")
        optimizer.step()
        model.requires_grad_(True)
    state = [t for own in optimizer.state.values() for t in own.values()]
    return [*(p.detach() for p in model.parameters()), *state]


@pytest.mark.parametrize("order", ["step while frozen", "zero_grad while frozen"])
@pytest.mark.parametrize(
    "kind",
    [
        *(kind for kind in KINDS if kind != "compiled"),
        pytest.param("compiled", marks=recent.COMPILES),
    ],
)
def test_a_model_that_is_frozen_around_steps_trains_as_any(kind: str, order: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found, usual = trained(kind, order), trained(kind, "usual")
    assert all(map(torch.equal, found, usual))
    assert len(found) == len(usual)


def test_a_weight_that_is_frozen_after_its_call_stays_where_it_is() -> None:
    """Autograd adds nothing to its gradient."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = SINGD(model, T=1)
    loss = model(torch.randn(8, 4)).square().sum()
    model[2].requires_grad_(False)
    loss.backward()
    before = model[2].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step()
    assert torch.equal(model[2].weight, before)


def test_a_weight_that_is_frozen_for_good_is_asked_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = SINGD(model, T=1)
    model[2].requires_grad_(False)
    before = model[2].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert not optimizer.state.get(model[2].weight)
    assert optimizer.state[model[0].weight]
