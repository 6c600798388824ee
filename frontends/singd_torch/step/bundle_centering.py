"""Bundles of weights that learn from gradients and of their biases: steps without a mean.

It is `singd_core.without_mean` for all stacks of a bundle together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from singd_core._array import cast
from singd_core._settings import StepSettings, rate_of_factors
from singd_core.levels import weight_of
from singd_core.rules import inputs_of
from singd_core.rules.centering import InputMean, InputSums, along, centered, cross
from singd_torch.step.begun import Gradients
from singd_torch.step.bundle import Bundle
from singd_torch.step.bundle_refresh import copy_back, due_parts, together
from singd_torch.tensors.matrices import Matrices


def without_means(
    bundle: Bundle, gradient: Tensor, s: StepSettings, given: Gradients
) -> tuple[Tensor, list[Tensor]]:
    """Take the means of the inputs out of the gradients of all weights.

    Gradients that are to refresh the factors tell the means first.

    Returns:
        The squares of the gradients of weights and of biases, and −μ of each stack.
    """
    assert given.ok is not None
    G, g = bundle.matrices(gradient), bundle.columns(gradient)
    squares = None
    if due_parts(bundle, s):
        squares = norms(G, g).square()
        _tell(bundle, G, g, squares, s, given.ok)
    inputs = _inputs(bundle)
    flat = inputs.mean * bundle.joint.K.on_rows(inputs.used * -1.0)
    minus = [bundle.joint.columns(i, flat) for i in range(len(bundle.parts))]
    for own, of_bias, mean in zip(G, g, minus, strict=True):
        centered(own, of_bias, mean, own)
    return norms(G, g).square(), minus


def norms(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The norms of matrices, and in a second row the norms of columns."""
    return Matrices([*weights, *biases]).norms().view(2, -1)


def steps_of_biases(
    bundle: Bundle,
    natural: Sequence[Tensor],
    columns: Sequence[Tensor],
    minus: Sequence[Tensor],
    scales: Tensor,
) -> Tensor:
    """The steps of all biases in a row: those of b' = b + W μ, and what W μ changes by (6.4).

    Args:
        bundle: The bundle.
        natural: The natural gradients of the weights.
        columns: The natural gradients of the biases.
        minus: −μ.
        scales: What multiplies weights, and what multiplies biases.
    """
    moved = [along(n, mean) for n, mean in zip(natural, minus, strict=True)]
    of_weight, of_bias = (torch.cat([x.reshape(-1) for x in some]) for some in (moved, columns))
    c, c_bias = map(bundle.joint.C.on_rows, scales)
    return torch.addcmul(of_bias * c_bias, of_weight, c)


def _tell(
    bundle: Bundle,
    G: Sequence[Tensor],
    g: Sequence[Tensor],
    squares: Tensor,
    s: StepSettings,
    ok: Tensor,
) -> None:
    """Tell the means of the inputs what gradients know of them."""
    due = due_parts(bundle, s)
    joint, factors = together(bundle, due)
    some = set(map(id, due))
    live = [i for i, part in enumerate(bundle.parts) if id(part) in some]
    inputs = inputs_of(factors)
    assert inputs is not None
    of = inputs.mean
    crosses = torch.cat([cross(cast(G[i], of), cast(g[i], of)).reshape(-1) for i in live])
    if len(live) < len(bundle.parts):
        squares = torch.cat([squares[:, bundle.joint.K.numbers[i]] for i in live], 1)
    sums = InputSums(crosses, *cast(squares, of).flip(0))
    rate = rate_of_factors(due[0].stack.layers[0].group["steps"], s)
    weight = weight_of(factors.averages.k + 1.0, rate)
    new = inputs.told(sums, weight, joint.K.on_rows, joint.K.squares_of)
    inputs.map(lambda old, new: torch.where(ok, new, old, out=old), new)
    copy_back(bundle, joint, due, factors)


def _inputs(bundle: Bundle) -> InputMean:
    found = inputs_of(bundle.factors)
    assert found is not None
    return found
