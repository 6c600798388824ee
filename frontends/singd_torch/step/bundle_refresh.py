"""A refresh of the factors of a bundle: the rule of the core, on the factors of all."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from singd_core._settings import Settings, rate_of_factors
from singd_core.preconditioner import Preconditioner
from singd_torch.step.begun import Gradients
from singd_torch.step.bundle import Bundle
from singd_torch.step.curvatures import curvatures
from singd_torch.step.joint import Joint, inverse_free
from singd_torch.step.stack import Stack, State
from singd_torch.tensors.pieces import narrowed


def refresh(bundle: Bundle, s: Settings, state: State, given: Gradients) -> None:
    """Write the factors that the pending rows make, of the stacks that have rows."""
    due = [part for part in bundle.parts if part.stack.layers[0].pending]
    if not due:
        return
    found = curvatures([part.stack for part in due], given.scales.rows)
    for part in due:
        for layer in part.stack.layers:  # its rows are as large as its factors
            layer.pending = {}
    joint, factors = bundle.joint, bundle.factors
    if len(due) < len(bundle.parts):
        joint = Joint([part.stack for part in due])
        factors = joint.copied()
    curvature = joint.curvature(found, factors.averages.k)
    report: dict[str, Any] = {}
    rate = rate_of_factors(due[0].stack.layers[0].group["steps"], s)
    new = factors.refresh(curvature, rate, s, report, joint.rounding(s))
    assert given.ok is not None
    use = given.ok & (sum(report.values()) < math.inf)  # an infinite factor step is not taken
    joint.write(factors, new, use)
    made = joint.preconditioners(factors, due[0].stack.uses(s))
    for i, part in enumerate(due):
        own = inverse_free(part.stack)
        if joint is not bundle.joint:
            own.map(Tensor.copy_, joint.part(i, factors))
        part.stack.hold(own, state, seen=True)
        _precondition_with(part.stack, made[i])
        if part.stack.report is not None:
            part.stack.report |= {name: joint.of(i, size) for name, size in report.items()}
    bundle.measured()


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
