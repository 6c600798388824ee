"""The tables of docs/paper.md that need no training: Theorem 1, bytes, and operations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pages import digits, table
from paper_figures import label
from paper_methods import METHODS, STRUCTURES
from paper_runs import DTYPES

WIDTHS = {"SINGD block": 30, "SINGD hierarchical": 30, "SINGD rank": 15}  # k


def theorem(found: dict[str, Any] | None) -> str:
    """The gap over β₁, and its slopes."""
    if found is None:
        return ""
    betas, names = found["beta"], ["IKFAC, float64", "IKFAC, float32", "INGD, float64"]
    rows = [[f"{b:.0e}", *(f"{found[n][i]:.2e}" for n in names)] for i, b in enumerate(betas)]
    few, wide = 4, [name for name in names if "64" in name]
    slopes = [np.polyfit(np.log(betas[:few]), np.log(found[name][:few]), 1)[0] for name in wide]
    each = ", ".join(f"{name} {slope:.2f}" for name, slope in zip(wide, slopes, strict=True))
    said = f"Slopes of the logarithms over the {few} smallest β₁: {each}."
    return "\n\n".join([table(["β₁", *names], rows), said])


def memory(found: dict[str, Any] | None) -> str:
    """State and peak of all methods in both precisions."""
    if found is None:
        return ""
    lines = []
    for method in METHODS:
        cells = []
        for dtype in DTYPES:
            mine, adamw = found[f"{method}, {dtype}"], found[f"AdamW, {dtype}"]
            for i in (0, 1):
                cells += [f"{mine[i] / 2**20:.3g}", f"{mine[i] / adamw[i]:.2f}"]
        lines.append([label(method), *cells])
    header = ["method"]
    for dtype in DTYPES:
        header += [f"state, {dtype}", "of AdamW's", f"peak, {dtype}", "of AdamW's"]
    return "\n\n".join([table(header, lines), f"MiB, on: {found['network']}."])


def counts(found: dict[str, Any] | None) -> str:
    """Theory beside what is counted: orders, and the count as a multiple of the order."""
    if found is None:
        return ""
    m, sides = found["rows"], found["sides"]
    lines = []
    for method in ("KFAC", "INGD", *STRUCTURES):
        k = WIDTHS.get(method)
        words, orders = _orders(method, k)
        cells = [label(method) + (f", k = {k}" if k else "")]
        for i, (word, order) in enumerate(zip(words, orders, strict=True)):
            mine = [c[i] / order(d, m) for c, d in zip(found[method], sides, strict=True)]
            cells += [word, ", ".join(digits(value) for value in mine)]
        lines.append(cells)
    header = ["method", "a refresh", "counted", "a direction", "counted", "numbers", "counted"]
    said = (
        f"A weight of shape d × d and m = {m} rows. *Counted* is the number of multiplications and "
        f"additions, or of numbers kept, over the order beside it, at d = "
        f"{', '.join(map(str, sides))}."
    )
    return "\n\n".join([table(header, lines), said])


def _orders(method: str, k: int | None) -> tuple[list[str], list[Any]]:
    if method in ("KFAC", "INGD"):
        words = ["m d² + d³", "d³", "d²"]
        return words, [lambda d, m: m * d**2 + d**3, lambda d, m: d**3, lambda d, m: d**2]
    if k is not None:
        words = ["k m d + k² d", "k d²", "k d"]
        orders = [
            lambda d, m: k * m * d + k**2 * d,
            lambda d, m: k * d**2,
            lambda d, m: k * d,
        ]
        return words, orders
    if method == "SINGD Toeplitz":
        words = ["m d log₂ d", "d² log₂ d", "d"]
        return words, [
            lambda d, m: m * d * math.log2(d),
            lambda d, m: d**2 * math.log2(d),
            lambda d, m: d,
        ]
    return ["m d", "d²", "d"], [lambda d, m: m * d, lambda d, m: d**2, lambda d, m: d]
