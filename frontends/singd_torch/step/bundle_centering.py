"""Bundles of weights that learn from gradients and of their biases: steps without a mean.

It is `singd_core.without_mean` for all stacks of a bundle that have such biases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from singd_core._array import cast
from singd_core._settings import StepSettings, rate_of_factors
from singd_core.rules import Factors, inputs_of
from singd_core.rules.centering import InputMean, InputSums, along, centered, cross
from singd_torch.step.begun import Gradients
from singd_torch.step.bundle import Bundle
from singd_torch.step.bundle_refresh import copy_back, due_parts, together
from singd_torch.tensors.matrices import Matrices


def take_out_means(
    bundle: Bundle, gradient: Tensor, s: StepSettings, given: Gradients
) -> list[Tensor]:
    """Take the means of the inputs out of the gradients of the weights; return −μ of each stack.

    Gradients that are to refresh the factors tell the means first.
    """
    G, g = bundle.weights(gradient)[: bundle.apart], bundle.biases(gradient)
    _tell(bundle, G, g, s, given)
    inputs = _means(bundle.factors)
    flat = inputs.mean * bundle.joint.K.on_rows(inputs.used * -1.0)
    minus = [bundle.joint.columns(i, flat) for i in range(bundle.apart)]
    for own, of_bias, mean in zip(G, g, minus, strict=True):
        centered(own, of_bias, mean, own)
    return minus


def steps_of_biases(
    bundle: Bundle,
    natural: Sequence[Tensor],
    columns: Sequence[Tensor],
    minus: Sequence[Tensor],
    scale: Tensor,
) -> Tensor:
    """The steps of all biases in a row: those of b' = b + W μ, and what W μ changes by (6.4).

    Args:
        bundle: The bundle.
        natural: The natural gradients of the weights.
        columns: The natural gradients of the biases.
        minus: −μ of each stack.
        scale: What multiplies the steps of all weights, then of all biases.
    """
    moved = [along(n, mean) for n, mean in zip(natural, minus, strict=False)]
    of_weight, of_bias = (torch.cat([x.reshape(-1) for x in some]) for some in (moved, columns))
    of_biases = scale[bundle.several :]
    c, c_bias = (bundle.joint.C.on_rows(x) for x in (scale[: len(of_biases)], of_biases))
    return of_bias * c_bias + of_weight * c


def _tell(
    bundle: Bundle, G: Sequence[Tensor], g: Sequence[Tensor], s: StepSettings, given: Gradients
) -> None:
    """Tell the means of the inputs what gradients know of them."""
    apart, now = bundle.parts[: bundle.apart], due_parts(bundle, s)
    live = [i for i, part in enumerate(apart) if part in now]
    if not live:
        return
    due = [apart[i] for i in live]
    every = due == apart
    joint, factors = (bundle.joint, bundle.factors) if every else together(bundle, due)
    inputs = _means(factors)
    G, g = ([some[i] for i in live] for some in (G, g))
    n, of = joint.K.numbers[len(due) - 1].stop, inputs.mean
    crosses = [cross(cast(own, of), cast(of_bias, of)) for own, of_bias in zip(G, g, strict=True)]
    squares = cast(Matrices([*G, *g]).norms().square(), of)
    sums = InputSums(torch.cat([x.reshape(-1) for x in crosses]), squares[n:], squares[:n])
    rate = rate_of_factors(due[0].stack.layers[0].group["steps"], s)
    new = inputs.told(sums, factors.averages.k[:n], rate, joint.K.on_rows, joint.K.squares_of)
    if given.ok is None:
        inputs.map(Tensor.copy_, new)
    else:
        keep = given.ok
        inputs.map(lambda old, new: torch.where(keep, new, old, out=old), new)
    copy_back(bundle, joint, due, factors)


def _means(factors: Factors) -> InputMean:
    found = inputs_of(factors)
    assert found is not None
    return found
