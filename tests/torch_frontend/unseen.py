"""A net with layers of all kinds, whose weights are also used where no call is seen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singd_torch import SINGD


class Net(nn.Module):
    """Layers of all kinds, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 8**0.5)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor, *, tied: bool = False) -> Tensor:
        x = self.table(tokens)
        x = x + torch.tanh(self.conv(x.mT)).mT
        x = x + self.attention(x, x, x)[0]
        x = x + torch.einsum("bnd,edf->bnef", x, self.experts).tanh().mean(2)
        return F.linear(x, self.table.weight) if tied else self.head(x)  # type: ignore[no-any-return]


def tokens() -> Tensor:
    return torch.randint(12, (16, 6))


def loss_of(model: Net, x: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(model(x, **given).flatten(0, 1), x.flip(1).flatten())


Loss = Callable[[Net, Tensor], Tensor]


def hidden(x: Tensor) -> Tensor:
    return torch.randn(*x.shape, 8, dtype=torch.float64)


def train(model: Net, optimizer: SINGD, loss: Loss, n: int = 5) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        loss(model, tokens()).backward()
        optimizer.step()
