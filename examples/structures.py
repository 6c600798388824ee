"""Draw the structures of K: which entries are free, what K Kᵀ looks like, and its inverse.

    python examples/structures.py --picture structures.png

K Kᵀ preconditions a gradient and approximates the inverse of the curvature; (K Kᵀ)⁻¹ is the
curvature that a structure can stand for. The matrices are random members of each structure.
"""

import argparse

import matplotlib

matplotlib.use("Agg")  # draws into a file, with no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm

from singd_core.structures import get

D = 16
STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "blockdiagonal:4": "block-diagonal",
    "triu": "triangular",
    "triubottomrightdiag:3": "rank-k triangular",
    "hierarchical:3,3": "hierarchical",
    "triltoeplitz": "triangular Toeplitz",
}
ROWS = ("K", "K Kᵀ", "(K Kᵀ)⁻¹")


def member(name: str, d: int = D) -> np.ndarray:
    """A random matrix of a structure, near the identity."""
    rng = np.random.default_rng(0)
    return np.asarray(get(name).restrict(np.eye(d) + 0.15 * rng.standard_normal((d, d))).dense())


def draw(path: str) -> None:
    """A column for each structure."""
    size = (1.45 * len(STRUCTURES), 1.55 * len(ROWS) + 0.3)
    figure, panels = plt.subplots(len(ROWS), len(STRUCTURES), figsize=size, layout="constrained")
    for column, (name, title) in zip(panels.T, STRUCTURES.items(), strict=True):
        K = member(name)
        product = K @ K.T
        for axes, M in zip(column, (K, product, np.linalg.inv(product)), strict=True):
            # what is zero but for rounding is white; each picture has its own scale
            M = np.where(np.abs(M) < 1e-9 * np.abs(M).max(), np.nan, M)
            most = np.nanmax(np.abs(M))
            axes.imshow(M, cmap="PuOr", norm=SymLogNorm(0.03 * most, vmin=-most, vmax=most))
            axes.set(xticks=[], yticks=[])
        column[0].set_title(title, fontsize=9)
    for axes, said in zip(panels[:, 0], ROWS, strict=True):
        axes.set_ylabel(said, fontsize=11)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", default="structures.png", help="where to draw it")
    draw(parser.parse_args().picture)


if __name__ == "__main__":
    main()
