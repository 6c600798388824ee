"""Train a small convolutional network on handwritten digits, nine optimizers side by side.

`make demo` runs this file. It trains in float32 and then in bfloat16, prints a table, and draws
`demo.png`. Everything is kept equal between the optimizers: start, batches, number of steps, and a
rate that falls linearly to zero.
"""

import argparse
import time
from collections.abc import Callable

import torch
from picture import Run, draw, side_by_side, table
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

from singd_torch import SINGD

# KFAC and IKFAC share these settings: up to O(lr_cov²) they have the same preconditioner, KFAC by
# inverting matrices, IKFAC without. Of lr 0.003, 0.01, 0.03 and damping 0.001, 0.01 they are the
# best for KFAC in float32. In bfloat16 KFAC diverges with all six, and with these from three other
# starts too. (With the default recipe, whose damping is a share of the curvature, it does not.)
DAMPING = 0.01
PAPER = {"recipe": "paper", "lr": 0.01, "damping": DAMPING, "T": 1, "lr_cov": 0.05}

# AdamW and SGD have the best rate of four (AdamW 0.001 to 0.03, SGD 0.01 to 0.3). SINGD runs with
# its default settings; they were found on several tasks, a network on these digits among them.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.03),
    "SGD, momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "KFAC": lambda net: SINGD(net, kfac=True, **PAPER),
    "IKFAC": lambda net: SINGD(net, kfac_like=True, **PAPER),
    "SINGD dense": lambda net: SINGD(net, structures=("dense", "dense")),
    "SINGD diagonal": lambda net: SINGD(net, structures=("diagonal", "diagonal")),
    "SINGD blockdiagonal": lambda net: SINGD(net, structures=("blockdiagonal:16",) * 2),
    "SINGD hierarchical": lambda net: SINGD(net, structures=("hierarchical:8,8",) * 2),
    "SINGD Toeplitz": lambda net: SINGD(net, structures=("triltoeplitz", "triltoeplitz")),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 64


def digits() -> tuple[torch.Tensor, ...]:
    """1437 images, 8 × 8 with values in [0, 1], and their labels to train on, 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def network() -> nn.Module:
    """Two convolutions and two linear layers, 13,706 parameters; always the same start."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    dtype: torch.dtype,
    steps: int,
    data: tuple[torch.Tensor, ...],
    after_step: Callable[..., None] = lambda loss: None,
) -> Run:
    """Train the network from its start; weights, activations and optimizer state are in `dtype`."""
    x, y, x_test, y_test = data
    x, x_test = x.to(dtype), x_test.to(dtype)
    net = network().to(dtype)
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches = torch.Generator().manual_seed(1)
    run = Run()
    spent = 0.0
    for step in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=batches)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[chosen]).float(), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - start
        run.losses.append(loss.item())
        run.seconds.append(spent)
        if run.indefinite_from is None and smallest_eigenvalue(optimizer) <= 0.0:
            run.indefinite_from = step + 1
        after_step(loss=run.losses[-1])
    with torch.no_grad():
        run.train_loss = nn.functional.cross_entropy(net(x).float(), y).item()
        run.accuracy = (net(x_test).argmax(dim=1) == y_test).float().mean().item()
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    size = sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor))
    run.bytes_per_parameter = size / sum(p.numel() for p in net.parameters())
    return run


def smallest_eigenvalue(optimizer: torch.optim.Optimizer) -> float:
    """Of the matrices S + λI that KFAC inverts, as it has stored them; infinite without KFAC."""
    stored = [t for entries in optimizer.state.values() for n, t in entries.items() if n[0] == "S"]
    finite = [S.double() for S in stored if S.isfinite().all()]
    return min((torch.linalg.eigvalsh(S)[0].item() + DAMPING for S in finite), default=torch.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="for each optimizer and dtype")
    parser.add_argument("--picture", default="demo.png", help="where to draw it")
    given = parser.parse_args()

    # The network is too small for a second thread to help, and one alone gives steadier times.
    torch.set_num_threads(1)
    data, console = digits(), Console()
    for dtype in DTYPES.values():  # the first steps of a process load and set up much of torch
        train(OPTIMIZERS["AdamW"], dtype, 2, data)

    def run(name: str, dtype: str, after_step: Callable[..., None]) -> Run:
        return train(OPTIMIZERS[name], DTYPES[dtype], given.steps, data, after_step)

    runs = side_by_side(run, OPTIMIZERS, DTYPES, given.steps, console)
    console.print(table(runs))
    for dtype_name in DTYPES:
        first = runs["KFAC", dtype_name].indefinite_from
        found = (
            f"is not positive definite from step {first} on" if first else "stays positive definite"
        )
        console.print(f"KFAC, {dtype_name}: S + λI, as stored, {found}.")
    console.print("(bfloat16 is slow on processors that have no instructions for it.)")
    draw(runs, given.picture)
    console.print(f"The picture is in {given.picture}.")


if __name__ == "__main__":
    main()
