"""Models that use their weights in ways that are drawn: the rows are right, or none are taken."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singd_torch import SINGD, check

D = 6

Use = Callable[[nn.Linear, Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, D)


def checkpointed(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = checkpoint(call, x, use_reentrant=False)
    return found


WITH_ROWS: dict[str, Use] = {
    "module": lambda m, x: m(x),
    "module twice": lambda m, x: m(m(x).tanh()),
    "linear": lambda m, x: F.linear(x, m.weight),
    "by name": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
    "transposed": lambda m, x: x @ m.weight.T,
    "turned": lambda m, x: x @ m.weight,
    "turned twice": lambda m, x: F.linear(x, m.weight.T.mT),
    "addmm": lambda m, x: torch.addmm(m.bias, flat(x), m.weight.t()).reshape(x.shape),
    "einsum": lambda m, x: torch.einsum("oi,ni->no", m.weight, flat(x)).reshape(x.shape),
    "copied": lambda m, x: x @ m.weight.t().contiguous(),
    "cast": lambda m, x: F.linear(x.float(), m.weight.float(), m.bias.float()).double(),
    "tells a dtype": lambda m, x: F.linear(x.to(m.weight), m.weight.type_as(x)),
    "in place": lambda m, x: m(x).mul_(2.0).relu_(),
    "checkpointed": lambda m, x: checkpointed(m, x),
    "expanded": lambda m, x: m(x.expand(3, *x.shape)).sum(0),
    "empty": lambda m, x: x + m(flat(x)[:0]).sum(),
    "from both sides": lambda m, x: F.linear(F.linear(x, m.weight), m.weight.T),
}
WITHOUT: dict[str, Use] = {
    "scaled": lambda m, x: F.linear(x, 2 * m.weight),
    "squared": lambda m, x: F.linear(x, m.weight @ m.weight),
    "dropped": lambda m, x: F.linear(x, F.dropout(m.weight, 0.2)),
    "sliced": lambda m, x: torch.cat([F.linear(x, W) for W in m.weight.chunk(2)], -1),
    "on the left": lambda m, x: (m.weight @ flat(x).T).T.reshape(x.shape),
    "multiplied": lambda m, x: (x[..., None, :] * m.weight).sum(-1),
    "scaled product": lambda m, x: torch.addmm(m.bias, flat(x), m.weight, beta=0.5).reshape(
        x.shape
    ),
    "its norm": lambda m, x: F.linear(x, m.weight) / m.weight.norm(),
    "bias apart": lambda m, x: F.linear(x, m.weight) + m.bias,
    "another bias": lambda m, x: F.linear(x, m.weight, 2 * m.bias),
    "in a function": lambda m, x: checkpointed(lambda x: F.linear(x, m.weight), x),
    "as a kernel": lambda m, x: F.conv1d(flat(x)[..., None], m.weight[..., None]).reshape(x.shape),
}
USES = WITH_ROWS | WITHOUT


class Net(nn.Module):
    def __init__(self, drawn: list[list[str]]) -> None:
        super().__init__()
        self.layers, self.drawn = nn.ModuleList(nn.Linear(D, D) for _ in drawn), drawn

    def forward(self, x: Tensor) -> Tensor:
        for layer, names in zip(self.layers, self.drawn, strict=True):
            for name in names:
                x = torch.tanh(USES[name](layer, x))  # type: ignore[arg-type]
        return x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return model(x).sin().square().mean()  # type: ignore[no-any-return]


def check_uses(drawn: list[list[str]], *shape: int) -> None:
    """Nobody who watches changes a gradient, and a layer has rows where it can have all."""
    torch.manual_seed(0)
    model, twin, x = Net(drawn).double(), Net(drawn).double(), torch.randn(*shape, D).double()
    twin.load_state_dict(model.state_dict())
    optimizer: Any = SINGD(model)
    loss_of(model, x).backward()
    loss_of(twin, x).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    optimizer.step()
    with_rows = {f"layers.{i}.weight" for i, own in enumerate(drawn) if set(own) <= set(WITH_ROWS)}
    assert check(model, lambda model: loss_of(model, x)).keys() == with_rows


@pytest.mark.filterwarnings("ignore:no rows of")
@pytest.mark.parametrize("use", USES)
def test_each_use(use: str) -> None:
    check_uses([[use]], 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no rows of")
@pytest.mark.parametrize("seed", range(20))
def test_several_uses_of_several_weights(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(10):
        drawn = [[draw.choice(list(USES)) for _ in range(draw.choice([1, 1, 2]))] for _ in range(3)]
        check_uses(drawn, *draw.choice([(5,), (2, 3), (2, 2, 2)]))
