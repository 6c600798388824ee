"""Each installed frontend trains: run by `make release-check` in an environment of its own."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

STEPS = 40
CHECKOUT = "--checkout" in sys.argv  # to try this script itself

rng = np.random.default_rng(0)
X = rng.standard_normal((64, 6)).astype(np.float32)
Y = np.tanh(X @ rng.standard_normal((6, 3)).astype(np.float32))


def numpy_losses() -> list[float]:
    """A linear map by the pure optimizer."""
    from singd_core import Optimizer, check

    params = {"map": (np.zeros((3, 6), np.float32), np.zeros(3, np.float32))}
    optimizer, losses = Optimizer(), []
    state = optimizer.init(params)
    for _ in range(STEPS):
        W, b = params["map"]
        error = X @ W.T + b - Y
        losses.append(0.5 * float(np.mean(np.sum(error**2, axis=1))))
        g = error / len(X)
        grads, rows = {"map": (g.T @ X, g.sum(0))}, {"map": (X, g)}
        check(grads, params, rows)
        updates, state = optimizer.update(
            grads, state, params, rows if optimizer.due(state) else None
        )
        params = optimizer.apply(params, updates)
    return losses


def torch_losses() -> list[float]:
    """A network by `singd_torch.SINGD`."""
    import torch
    from torch import nn

    from singd_torch import SINGD

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer, losses = SINGD(model), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.from_numpy(X)), torch.from_numpy(Y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_losses() -> list[float]:
    """A network by `singd_jax.singd`."""
    import jax
    import jax.numpy as jnp
    import optax

    from singd_jax import find_layers, singd, value_and_curvature

    def loss(params, x, y):  # type: ignore[no-untyped-def]
        return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"] - y) ** 2)

    params = {
        "first": 0.4 * jax.random.normal(jax.random.key(0), (6, 16)),
        "last": 0.2 * jax.random.normal(jax.random.key(1), (16, 3)),
    }
    layers = find_layers(loss)(params, X, Y)
    tx = singd(layers=layers)
    state, losses = tx.init(params), []
    step = jax.jit(value_and_curvature(loss, layers))
    for _ in range(STEPS):
        value, grads, curvature = step(params, state, X, Y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses


def main() -> None:
    installed = None if CHECKOUT else importlib.metadata.version("singd-core")
    version = installed or importlib.import_module("singd_core").__version__
    for name, train in (
        ("singd_core", numpy_losses), ("singd_torch", torch_losses), ("singd_jax", jax_losses)
    ):  # fmt: skip
        package = importlib.import_module(name)
        where = Path(package.__file__ or "").parent
        assert CHECKOUT or "site-packages" in where.parts, f"{where}: not what was installed"
        assert package.__version__ == version, name
        assert (where / "py.typed").is_file(), name
        losses = train()
        assert losses[-1] < 0.2 * losses[0], (name, losses[0], losses[-1])
        print(f"{name} {version}: loss {losses[0]:.3g} to {losses[-1]:.2g} in {STEPS} steps")


if __name__ == "__main__":
    main()
