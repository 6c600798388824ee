"""What docs/paper.md shows without a training: Theorem 1, bytes, and counts of operations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Trainee, anatomy
from paper_methods import FIRST_ORDER, METHODS, STRUCTURES, build
from paper_runs import DTYPES
from problems import PROBLEMS
from run_store import CODE, versions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from singd_core import Settings, rules, settings
from singd_core.curvature import Curvature
from singd_core.structures import get

# ---- Theorem 1 ----------------------------------------------------------------------------------

BETAS = tuple(float(f"{beta:.3g}") for beta in np.geomspace(1e-6, 1e-1, 11))
DAMPING = 0.01
REFRESHES = 20
BATCH = 64


def theorem() -> dict[str, Any]:
    """‖K Kᵀ − (S_K + λI)⁻¹‖ as a share of ‖(S_K + λI)⁻¹‖ over β₁, after equal curvatures.

    A linear layer on the handwritten digits of scikit-learn has the curvatures.
    """
    found: dict[str, Any] = {"beta": BETAS, "damping": DAMPING, "refreshes": REFRESHES}
    ikfac = {"rule": "ikfac"}
    found["IKFAC, float64"] = [_gap(np.float64, lr_cov=beta, **ikfac) for beta in BETAS]
    found["IKFAC, float32"] = [_gap(np.float32, lr_cov=beta, **ikfac) for beta in BETAS]
    found["INGD, float64"] = [_gap(np.float64, lr_cov=beta, alpha1=0.0) for beta in BETAS]
    return found


def _rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs, and gradients of the mean loss with respect to equal logits, of some batches."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = []
    for k in range(REFRESHES):
        batch = slice(k * BATCH, (k + 1) * BATCH)
        rows.append((images[batch] / 16.0, (0.1 - np.eye(10)[labels[batch]]) / BATCH))
    return rows


def _gap(dtype: Any, **given: Any) -> float:
    s = settings("paper", damping=DAMPING, **given)
    like, dense = np.zeros(1, dtype), get("dense")
    rows = _rows()
    d_in, d_out = rows[0][0].shape[1], rows[0][1].shape[1]
    factors = rules.start((dense, dense), ((), d_out, d_in), s, like, like)
    S = (1.0 - DAMPING) * np.eye(d_in)  # so that S + λI = I = K Kᵀ at the start
    for A, B in rows:
        inputs, outputs = factors.measure(A.astype(dtype), B.astype(dtype))
        factors = factors.refresh(Curvature.of(inputs, BATCH, outputs, BATCH), s.lr_cov, s)
        S = (1.0 - s.lr_cov) * S + s.lr_cov * A.T @ A / BATCH
    K = np.asarray(factors.K.dense(), np.float64)
    inverse = np.linalg.inv(S + DAMPING * np.eye(d_in))
    return float(f"{np.linalg.norm(K @ K.T - inverse) / np.linalg.norm(inverse):.4g}")


# ---- bytes --------------------------------------------------------------------------------------

NETWORK = "cnn"  # of `make bench`


def memory() -> dict[str, Any]:
    """State and peak of all methods on one network in two dtypes, with a refresh every 2 steps."""
    problem = PROBLEMS[NETWORK]

    def start(method: str, dtype: torch.dtype) -> Trainee:
        torch.manual_seed(0)
        model = problem.model().to(dtype)
        given = {} if method in FIRST_ORDER else {"T": 2}
        optimizer = build(method, model, problem.loss_average, lr=1e-6, **given)
        x, y = problem.batch()
        return Trainee(
            model, optimizer, lambda out, y: problem.loss(out.float(), y), x.to(dtype), y
        )

    found: dict[str, Any] = {"network": problem.title}
    for name, dtype in DTYPES.items():
        for method in METHODS:
            trainee = partial(start, method, dtype)
            anatomy(trainee, lambda steps, seconds: steps >= 2, torch.device("cpu"))  # first calls
            seen = anatomy(trainee, lambda steps, seconds: steps >= 4, torch.device("cpu"))
            found[f"{method}, {name}"] = [seen.state, seen.peak]
    return found


# ---- operations ---------------------------------------------------------------------------------

ROWS = 128  # m: of a batch
SIDES = (256, 512, 1024)  # d of a square weight
COUNTED = {
    "KFAC": ("dense", {"rule": "kfac"}),
    "INGD": ("dense", {}),
    **{name: (structure, {}) for name, structure in STRUCTURES.items()},
}


class Counter(TorchDispatchMode):
    """Counts multiplications and additions; what only moves numbers counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += _operations(func, args, kwargs or {}, out)
        return out


ELEMENTWISE = {"add", "add_", "sub", "mul", "mul_", "div", "neg", "sqrt", "reciprocal", "rsub"}
SUMS = {"sum", "linalg_vector_norm"}


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    name = func.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if name in ("_fft_r2c", "_fft_c2r"):  # 5/2 n log₂ n of n real numbers
        real, axis = (args[0] if name == "_fft_r2c" else out), args[1][0]
        return 2.5 * real.numel() * math.log2(real.shape[axis])
    if name == "linalg_inv_ex":
        return 2.0 * out[0].shape[-1] ** 3
    if name in ELEMENTWISE:
        return out.numel() * (6.0 if out.is_complex() and "mul" in name else 1.0)
    return float(args[0].numel()) if name in SUMS else 0.0


def counts() -> dict[str, Any]:
    """Operations of a refresh and of a direction, and numbers kept, for a square weight."""
    found: dict[str, Any] = {"rows": ROWS, "sides": SIDES}
    for name, (structure, given) in COUNTED.items():
        s = settings("paper", **given)
        found[name] = [_count(structure, s, d) for d in SIDES]
    return found


def _count(structure: str, s: Settings, d: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    like, pair = torch.zeros(1), (get(structure), get(structure))
    A, B, G = (torch.randn(n, d, generator=generator) for n in (ROWS, ROWS, d))
    factors = rules.start(pair, ((), d, d), s, like, like)
    with Counter() as refreshing:
        inputs, outputs = factors.measure(A, B)
        factors = factors.refresh(Curvature.of(inputs, ROWS, outputs, 1), 1e-3, s)
    with Counter() as directing:
        factors.precondition(G)
    kept = sum(a.numel() for name, a in factors.named_arrays() if a.ndim > 0)
    return [refreshing.operations, directing.operations, kept]


# ---- kept ---------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "theorem": theorem,
    "counts": counts,
    "memory": memory,
}


def measured(name: str, folder: Path) -> dict[str, Any] | None:
    """What is kept of a measure."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(name: str, folder: Path) -> None:
    """Measure, unless that is done."""
    if measured(name, folder) is None:
        found = MEASURES[name]() | {"code": CODE, "versions": versions(name)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found) + "\n")
