"""Fine-tuning: SINGD beside AdamW on a network that was trained before.

A small CNN learns the digits 0 to 4 of MNIST by AdamW. It then gets a new head and learns 5 to 9
from 100 examples, in 120 steps of 25 examples with a linear decay of the rate: all of it from the
start, or the head alone for half of the steps. The accuracy is of the test examples.

    python benchmarks/finetune.py

It prints a table of all rates that were tried: means and ranges over the seeds. One thread takes
about two minutes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pages import table
from task_data import pooled_mnist
from torch import Tensor, nn

from singd_torch import SINGD

STEPS, EXAMPLES, BATCH = 120, 100, 25
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"`AdamW(lr={lr:g})`": (torch.optim.AdamW, {"lr": lr})
        for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
    },
    "`SINGD(model)`": (SINGD, {}),
    **{f"`lr={lr:g}`": (SINGD, {"lr": lr}) for lr in (0.4, 0.04, 0.012, 0.004)},
    '`structures="diagonal"`': (SINGD, {"structures": "diagonal"}),
    '`structures="diagonal", lr=0.012`': (SINGD, {"structures": "diagonal", "lr": 0.012}),
}


def digits(low: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Five digits, to train on and to test on."""
    parts = []
    for x, y in pooled_mnist():
        mine = (y >= low) & (y < low + 5)
        parts.append((x[mine], y[mine] - low))
    return parts[0], parts[1]


def head() -> nn.Module:
    """What tells five digits apart."""
    return nn.Linear(64, 5)


@functools.cache
def pretrained(seed: int) -> nn.Sequential:
    """The network that knows 0 to 4."""
    torch.manual_seed(seed)
    body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    body += (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(288, 64), nn.ReLU(), head())
    (x, y), _ = digits(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        i = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    return model


def tuned(kind: Any, given: dict[str, Any], seed: int, alone: int) -> float:
    """The accuracy after fine-tuning, with the head alone in the first steps."""
    model = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    model[-1] = head()
    (x, y), (x_test, y_test) = digits(5)
    x, y = x[:EXAMPLES], y[:EXAMPLES]
    optimizer = kind(model if kind is SINGD else model.parameters(), **given)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    for step in range(STEPS):
        model[:-1].requires_grad_(step >= alone)
        i = torch.randint(EXAMPLES, (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).double().mean())


def main(given: Sequence[str] | None = None) -> str:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = []
    for name, (kind, settings) in OPTIMIZERS.items():
        cells = [name]
        for alone in (0, STEPS // 2):
            found = [100.0 * tuned(kind, settings, seed, alone) for seed in args.seeds]
            cells.append(f"{statistics.fmean(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        rows.append(cells)
    shown = table(["accuracy in %", "all layers", "the head first"], rows)
    print(shown)
    return shown


if __name__ == "__main__":
    main()
