"""Deep networks: SINGD beside AdamW, as the number of weight matrices grows.

Three kinds of networks learn the digits of scikit-learn in 200 steps: layers with tanh that begin
orthogonal, residual blocks of two layers behind a norm, and transformer blocks on patches. SINGD
has its default rate at every depth, and AdamW the best of four rates for each cell.

    python benchmarks/deep.py

It prints a table of losses of the last batches: means and ranges over the seeds. "Full steps" is
SINGD without equation (5.10b), which makes steps shorter where there are many matrices. One thread
takes about ten minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import task_data
import torch
import torch.nn.functional as F
from pages import digits, table
from torch import Tensor, nn

from singd_core import step
from singd_torch import SINGD

WIDTH, STEPS, LAST = 32, 200, 20
DEPTHS = (12, 24, 48)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def plain(depth: int) -> nn.Module:
    """Layers with tanh between them."""
    layers: list[nn.Module] = [nn.Linear(64, WIDTH)]
    for _ in range(depth - 2):
        layers += [nn.Tanh(), nn.Linear(WIDTH, WIDTH)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(WIDTH, 10))
    for p in model.parameters():
        nn.init.orthogonal_(p) if p.ndim > 1 else nn.init.zeros_(p)
    return model


class Residual(nn.Module):
    """What a block adds to its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """The input and what is added."""
        added: Tensor = self.block(x)
        return x + added


def residual(depth: int) -> nn.Module:
    """Residual blocks, each of a norm and two layers."""
    blocks = [
        Residual(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
            )
        )
        for _ in range(depth // 2 - 1)
    ]
    return nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 10))


class Transformer(nn.Module):
    """Transformer blocks of four matrices on patches of 2 × 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 10)
        self.places = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(depth // 4)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        logits: Tensor = self.head(self.blocks(self.patches(patches) + self.places).mean(1))
        return logits


NETWORKS = {"tanh layers": plain, "residual blocks": residual, "transformer": Transformer}
SCHEDULES = {"decay": 0.0, "constant": 1.0}


@contextmanager
def full_steps() -> Iterator[None]:
    """Without equation (5.10b)."""
    with mock.patch.object(step, "FEW", 1 << 20):
        yield


def trained(network: str, depth: int, end: float, seed: int, steps: int, **given: Any) -> float:
    """The mean loss of the last batches, at a rate that goes to so much of itself."""
    torch.manual_seed(seed)
    (x, y), _ = task_data.digits()
    x, model = x.flatten(1), NETWORKS[network](depth)
    adamw = "lr" in given
    optimizer = torch.optim.AdamW(model.parameters(), **given) if adamw else SINGD(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-LAST:])


def cells(network: str, depth: int, end: float, seeds: Sequence[int], steps: int) -> list[str]:
    """The losses of all optimizers."""

    def told(losses: Sequence[float], more: str = "") -> str:
        mean, least, most = statistics.fmean(losses), min(losses), max(losses)
        return f"{digits(mean)} ({digits(least)} to {digits(most)}){more}"

    def losses(**given: Any) -> list[float]:
        return [trained(network, depth, end, seed, steps, **given) for seed in seeds]

    rivals: Mapping[float, list[float]] = {lr: losses(lr=lr) for lr in RATES}
    best = min(RATES, key=lambda lr: statistics.fmean(rivals[lr]))
    with full_steps():
        full = losses()
    return [told(rivals[best], f" at {best:g}"), told(losses()), told(full)]


def main(given: Sequence[str] | None = None) -> str:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = [
        [network, str(depth), name, *cells(network, depth, end, args.seeds, args.steps)]
        for network in NETWORKS
        for depth in args.depths
        for name, end in SCHEDULES.items()
    ]
    header = ["network", "depth", "rate", "AdamW, best of four", "`SINGD(model)`", "full steps"]
    shown = table(header, rows, words=3)
    print(shown)
    return shown


if __name__ == "__main__":
    main()
