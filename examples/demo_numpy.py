"""Train a two-layer network on handwritten digits with NumPy alone, its gradients written by hand.

`make demo-numpy` runs this file. It trains in float64 and then in float32, with the same start,
batches and number of steps for every optimizer and a rate that falls linearly to zero. It shows the
table and the picture of `make demo`; no autograd framework is imported.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from picture import Run, draw, side_by_side, table
from rich.console import Console
from sklearn.datasets import load_digits

from singd_core import Fallback, Optimizer

# KFAC and IKFAC share settings, as in `demo.py`. All three have the best rate of 0.001 to 0.03.
# SINGD runs with its default settings.
PAPER = {"recipe": "paper", "damping": 0.01, "T": 1, "lr_cov": 0.05}

# The peak of the rate, and the optimizer with a rate that may change: a 0-d array.
Make = Callable[[np.ndarray], Optimizer]


def singd(structure: str) -> tuple[float, Make]:
    return 0.12, lambda lr: Optimizer(lr=lr, structures=(structure, structure))


OPTIMIZERS: dict[str, tuple[float, Make]] = {
    "AdamW": (0.03, lambda lr: Optimizer({}, recipe="paper", fallback=Fallback(lr=lr))),
    "KFAC": (0.01, lambda lr: Optimizer(lr=lr, kfac=True, **PAPER)),
    "IKFAC": (0.01, lambda lr: Optimizer(lr=lr, kfac_like=True, **PAPER)),
    "SINGD dense": singd("dense"),
    "SINGD diagonal": singd("diagonal"),
    "SINGD blockdiagonal": singd("blockdiagonal:16"),
    "SINGD hierarchical": singd("hierarchical:8,8"),
    "SINGD Toeplitz": singd("triltoeplitz"),
}
DTYPES = ("float64", "float32")
HIDDEN, BATCH = 64, 64

Params = dict[str, np.ndarray]


def digits() -> tuple[np.ndarray, ...]:
    """1437 images, 64 numbers in [0, 1] each, and their labels to train on, 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = images[order] / 16.0, labels[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def network(dtype: str) -> Params:
    """Two layers, 4,810 parameters, always the same start; a layer's last column is its bias."""
    rng, params = np.random.default_rng(0), {}
    for name, d_out, d_in in (("hidden", HIDDEN, 64), ("output", 10, HIDDEN)):
        weight = rng.standard_normal((d_out, d_in)) * np.sqrt(2.0 / d_in)
        params[name] = np.hstack([weight, np.zeros((d_out, 1))]).astype(dtype)
    return params


def with_ones(x: np.ndarray) -> np.ndarray:
    """`x` with a last column of ones, which multiplies the bias."""
    return np.hstack([x, np.ones_like(x[:, :1])])


def forward(params: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs of both layers, and the logarithms of the classes' probabilities."""
    a1 = with_ones(x)
    a2 = with_ones(np.maximum(a1 @ params["hidden"].T, 0.0))
    z = a2 @ params["output"].T
    z = z - z.max(axis=1, keepdims=True)
    return a1, a2, z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(log_p: np.ndarray, y: np.ndarray) -> float:
    """The mean over the batch."""
    return float(-log_p[np.arange(len(y)), y].mean())


def backward(params: Params, x: np.ndarray, y: np.ndarray) -> tuple[float, Params, dict[str, Any]]:
    """The mean cross-entropy of a batch, its gradients, and the rows of both layers."""
    a1, a2, log_p = forward(params, x)
    # the gradients at the outputs of both layers
    g2 = (np.exp(log_p) - np.eye(10, dtype=x.dtype)[y]) / len(y)
    g1 = (g2 @ params["output"])[:, :-1] * (a2[:, :-1] > 0.0)
    grads = {"hidden": g1.T @ a1, "output": g2.T @ a2}
    return cross_entropy(log_p, y), grads, {"hidden": (a1, g1), "output": (a2, g2)}


def train(
    name: str, dtype: str, steps: int, data: tuple[np.ndarray, ...], after_step: Callable[..., None]
) -> Run:
    """Train the network from its start; weights, activations and optimizer state are in `dtype`."""
    x, y, x_test, y_test = data
    x, x_test = x.astype(dtype), x_test.astype(dtype)
    peak, make = OPTIMIZERS[name]
    lr = np.array(peak)
    params, optimizer = network(dtype), make(lr)
    state = optimizer.init(params)
    batches, run, spent = np.random.default_rng(1), Run(), 0.0
    for step in range(steps):
        chosen = batches.integers(len(x), size=BATCH)
        start = time.perf_counter()
        lr[...] = peak * (1.0 - step / steps)
        loss, grads, rows = backward(params, x[chosen], y[chosen])
        rows = {layer: rows[layer] for layer in state.layers}  # AdamW wants none
        updates, state = optimizer.update(grads, state, params, rows)
        params = optimizer.apply(params, updates)
        spent += time.perf_counter() - start
        run.losses.append(loss)
        run.seconds.append(spent)
        after_step(loss=loss)
    run.train_loss = cross_entropy(forward(params, x)[-1], y)
    run.accuracy = float((forward(params, x_test)[-1].argmax(axis=1) == y_test).mean())
    size = sum(array.nbytes for _, array in state.named_arrays())
    run.bytes_per_parameter = size / sum(W.size for W in params.values())
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="for each optimizer and dtype")
    parser.add_argument("--picture", default="demo.png", help="where to draw it")
    given = parser.parse_args()
    data, console = digits(), Console()

    def run(name: str, dtype: str, after_step: Callable[..., None]) -> Run:
        return train(name, dtype, given.steps, data, after_step)

    runs = side_by_side(run, OPTIMIZERS, DTYPES, given.steps, console)
    console.print(table(runs))
    draw(runs, given.picture)
    console.print(f"The picture is in {given.picture}.")


if __name__ == "__main__":
    main()
