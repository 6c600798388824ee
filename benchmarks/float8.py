"""Factors that are stored in 8 bits between steps, beside factors in float32.

    OMP_NUM_THREADS=1 python benchmarks/float8.py

SINGD does not offer this: products need numbers of at least 16 bits. Here the factors of the state
are rounded after each step, with one scale for each array, as a store of 8 bits would keep them. It
trains tasks of the comparison with a linear decay, and writes a table into docs/low_precision.md.
One core takes about ten minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from compare_runs import stepped
from pages import ROOT, digits, table, write
from rich.progress import track
from tasks import TASKS
from torch import Tensor

from singd_torch import SINGD

NAMES = ["digits-mlp", "digits-cnn", "mnist-cnn", "autoencoder", "wide-mlp", "transformer", "lstm"]
SEEDS = 2, 3
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
WAYS = [("e4m3", True), ("e4m3", False), ("e5m2", True)]


def rounded(a: Tensor, dtype: torch.dtype, *, stochastic: bool) -> Tensor:
    """The numbers that a store of 8 bits has of an array, with one scale for all of them."""
    most = torch.finfo(dtype).max
    scale = most / a.abs().amax().clamp_min(most * torch.finfo(a.dtype).tiny)
    x = a * scale
    if not stochastic:
        return x.to(dtype).to(a.dtype) / scale
    # the distance of neighbours: 2^e ε for numbers from 2^e on, and below the least normal number
    lowest = torch.finfo(dtype).smallest_normal
    ulp = torch.exp2(x.abs().clamp_min(lowest).log2().floor()) * torch.finfo(dtype).eps
    return ((x / ulp + torch.rand_like(x)).floor() * ulp).clamp(-most, most) / scale


def trained(name: str, dtype: torch.dtype | None, seed: int, *, steps: int, **how: bool) -> float:
    """The training loss after training with a linear decay."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = task.model()
    optimizer = SINGD(model, loss_average=task.loss_average)

    def store(*_: object) -> None:
        saved = optimizer.state_dict()
        for entries in saved["state"].values():
            for key, value in entries.items():
                if key.startswith(("K.", "C.")) and value.numel():
                    entries[key] = rounded(value, dtype, **how)
        optimizer.load_state_dict(saved)

    if dtype is not None:
        optimizer.register_step_post_hook(store)
    stepped(task, model, optimizer, lambda step: 1.0 - step / task.steps, seed, steps)
    return task.evaluate(model)[0]


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--quick", action="store_true", help="two steps; nothing is written")
    args = parser.parse_args(given)
    rows = []
    for name in track(args.tasks):
        steps, seeds = (2, SEEDS[:1]) if args.quick else (TASKS[name].steps, SEEDS)
        found = [[trained(name, None, seed, steps=steps) for seed in seeds]]
        for dtype, stochastic in WAYS:
            of = DTYPES[dtype]
            found.append([trained(name, of, s, steps=steps, stochastic=stochastic) for s in seeds])
        rows.append([name, *(digits(statistics.fmean(losses)) for losses in found)])
    ways = [f"{dtype}, {'stochastic' if drawn else 'nearest'}" for dtype, drawn in WAYS]
    text = table(["task", "float32", *ways], rows)
    print(text)
    if not args.quick:
        write(ROOT / "docs" / "low_precision.md", "python benchmarks/float8.py", text)


if __name__ == "__main__":
    main()
