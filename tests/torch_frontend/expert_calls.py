"""Products of inputs with the matrices of a stack of experts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from uses import draw

E, D, O = 3, 5, 4
IN_OUT, OUT_IN = (E, D, O), (E, O, D)
GROUPED = hasattr(F, "grouped_mm")


class Experts(nn.Module):
    """A stack of matrices that a function uses, behind a layer."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.W = nn.Parameter(torch.randn(shape) / D**0.5)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(torch.tanh(self.first(x)), self.W)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def looped(use: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Each expert for rows of its own, of different number, and one for none."""

    def call(x: Tensor, W: Tensor) -> Tensor:
        return torch.cat([use(x[:4], W[0]), use(x[3:], W[torch.tensor(2)])])

    return call


def unbound(x: Tensor, W: Tensor) -> Tensor:
    return torch.stack([x @ w for w in W])


# What the weight is, what is called with it, and the input.
CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "bmm": (IN_OUT, torch.bmm, draw(E, 6, D)),
    "bmm with the transposes": (OUT_IN, lambda x, W: torch.bmm(x, W.mT), draw(E, 6, D)),
    "bmm from the left": (OUT_IN, lambda x, W: torch.bmm(W, x.mT), draw(E, 6, D)),
    "baddbmm": (IN_OUT, lambda x, W: torch.baddbmm(x[..., :O], x, W), draw(E, 6, D)),
    "matmul of what all see": (IN_OUT, lambda x, W: x @ W, draw(6, D)),
    "matmul of examples": (IN_OUT, torch.matmul, draw(2, E, 6, D)),
    "matmul of examples that all see": (IN_OUT, torch.matmul, draw(2, 1, 6, D)),
    "matmul from the left": (OUT_IN, lambda x, W: W @ x.mT, draw(6, D)),
    "einsum": (IN_OUT, lambda x, W: torch.einsum("ecd,edf->ecf", x, W), draw(E, 6, D)),
    "einsum of examples": (
        OUT_IN,
        lambda x, W: torch.einsum("becd,efd->befc", x, W),
        draw(2, E, 6, D),
    ),
    "einsum of what all see": (
        IN_OUT,
        lambda x, W: torch.einsum("edf, bnd -> bnef", W, x),
        draw(2, 6, D),
    ),
    "einsum of one that all see": (
        IN_OUT,
        lambda x, W: torch.einsum("ecd,edf->ecf", x, W),
        draw(1, 6, D),
    ),
    "einsum of examples that all see": (
        OUT_IN,
        lambda x, W: torch.einsum("becd,efd->befc", x, W),
        draw(2, 1, 6, D),
    ),
    "einsum with dots": (
        IN_OUT,
        lambda x, W: torch.einsum("...nd,...df->...nf", x, W),
        draw(2, E, 6, D),
    ),
    "einsum with dots of what all see": (
        IN_OUT,
        lambda x, W: torch.einsum("... n d, ... d f -> ... n f", x, W),
        draw(6, D),
    ),
    "einsum of a list": (IN_OUT, lambda x, W: torch.einsum("nd,edf->nef", [x, W]), draw(6, D)),
    "loop, linear": (OUT_IN, looped(F.linear), draw(9, D)),
    "loop, transposes": (OUT_IN, looped(lambda x, w: x @ w.T), draw(9, D)),
    "loop, products": (IN_OUT, looped(torch.mm), draw(9, D)),
    "loop of a transpose": (IN_OUT, lambda x, W: F.linear(x, W.transpose(1, 2)[1]), draw(9, D)),
    "loop, einsum": (IN_OUT, lambda x, W: torch.einsum("nd,do->no", x, W[1]), draw(9, D)),
    "select": (IN_OUT, lambda x, W: x @ W.select(0, -1), draw(9, D)),
    "permute": (IN_OUT, lambda x, W: F.linear(x, W.permute(0, 2, 1)[1]), draw(9, D)),
    "unbind": (IN_OUT, unbound, draw(9, D)),
    "checkpoint of a module": (IN_OUT, torch.bmm, draw(E, 6, D)),
}


def model_of(case: str) -> tuple[nn.Module, Tensor]:
    shape, call, x = CALLS[case]
    model: nn.Module = Experts(shape, call).double()
    if case.startswith("checkpoint"):
        model = Outer(model)
    return model, x
