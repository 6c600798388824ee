"""A refresh of the factors of a bundle: the rule of the core, on the factors of all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core._array import norm
from singd_core._settings import Settings, rate_of_factors
from singd_core.curvature import Curvature
from singd_core.preconditioner import Preconditioner
from singd_core.rules import InverseFree, Shampoo
from singd_torch.step.begun import Gradients, learns_now
from singd_torch.step.bundle import Bundle, Part
from singd_torch.step.curvatures import curvatures
from singd_torch.step.joint import Joint, inverse_free
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.pieces import narrowed


def due_parts(bundle: Bundle, s: Settings) -> list[Part]:
    """The stacks whose factors are refreshed in this step."""
    if bundle.learns:
        return [part for part in bundle.parts if learns_now(part.stack, s)]
    return [part for part in bundle.parts if part.stack.layers[0].pending]


def together(bundle: Bundle, due: Sequence[Part]) -> tuple[Joint, InverseFree]:
    """The factors of some stacks as those of one layer, copies unless all stacks are due."""
    if len(due) == len(bundle.parts):
        return bundle.joint, bundle.factors
    joint = Joint([part.stack for part in due])
    return joint, joint.copied()


def copy_back(bundle: Bundle, joint: Joint, due: Sequence[Part], factors: InverseFree) -> None:
    """Let the stacks have what has been written to `together`."""
    if joint is not bundle.joint:
        for i, part in enumerate(due):
            inverse_free(part.stack).map(Tensor.copy_, joint.part(i, factors))


def refresh(
    bundle: Bundle,
    s: Settings,
    state: State,
    given: Gradients,
    gradient: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the factors that pending rows make, or the gradients of all, with their squares."""
    due = due_parts(bundle, s)
    if not due:
        return
    if gradient is None:
        found = curvatures([part.stack for part in due], given.scales.rows)
    for part in due:
        for layer in part.stack.layers:  # its rows are as large as its factors
            layer.pending = {}
    joint, factors = together(bundle, due)
    if gradient is None:
        curvature = joint.curvature(found, factors.averages.k)
    else:
        curvature = _curvature_of(bundle, joint, due, *gradient)
    report: dict[str, Any] = {}
    rate = rate_of_factors(due[0].stack.layers[0].group["steps"], s)
    new = factors.refresh(curvature, rate, s, report, joint.rounding(s))
    use = given.allows(sum(report.values()) < math.inf)  # an infinite factor step is not taken
    joint.write(factors, new, use)
    made = joint.preconditioners(factors, due[0].stack.uses(s))
    copy_back(bundle, joint, due, factors)
    for i, part in enumerate(due):
        part.stack.hold(inverse_free(part.stack), state, seen=True)
        _precondition_with(part.stack, made[i])
        if part.stack.report is not None:
            part.stack.report |= {name: joint.of(i, size) for name, size in report.items()}
    if not bundle.learns:  # gradients do not tell the size of inputs
        bundle.measured()


def _curvature_of(
    bundle: Bundle, joint: Joint, due: Sequence[Part], gradient: Tensor, squares: Tensor
) -> Curvature:
    """`Shampoo.curvature` of the gradients of some stacks."""
    if joint is not bundle.joint:
        places = zip(bundle.parts, bundle.joint.K.numbers, strict=True)
        squares = torch.cat([squares[place] for part, place in places if part in due])
    found = []
    for part in due:
        factors, kind = inverse_free(part.stack), part.stack.layers[0].kind
        assert isinstance(factors, Shampoo)
        X, H_K, H_C = factors.products(kind.matrix(*part.joined(gradient)))
        root = norm(X, 2)
        found.append(Curvature(H_K, H_C, root, root))
    like = bundle.factors.averages.k
    sums = joint.curvature(found, like)
    of_rows, of_columns = (side.powers(-1.0, like) for side in (joint.C, joint.K))
    share = of_rows * of_columns
    h, t = sums.t_U * sums.t_U * share, squares[: len(share)].to(like) * share
    return Curvature(sums.H_K.scale(of_rows), sums.H_C.scale(of_columns), h, t)


def precondition(stack: Stack, s: Settings) -> Preconditioner:
    """What preconditions until the next refresh."""
    if stack.preconditioner is not None:
        return stack.preconditioner
    return _precondition_with(
        stack, inverse_free(stack).preconditioner(stack.uses(s), balanced=True)
    )


def _precondition_with(stack: Stack, made: Preconditioner) -> Preconditioner:
    if stack.autocast:
        K, C = (dataclasses.replace(side, L=narrowed(side.L)) for side in (made.K, made.C))
        made = Preconditioner(K, C)
    return stack.precondition_with(made)
