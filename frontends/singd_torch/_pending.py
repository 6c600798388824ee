"""The curvature of one layer, summed over the uses of its weight until the next step."""

from __future__ import annotations

import dataclasses
from typing import Any

from singd_core.updates.curvature import Curvature, Measured


@dataclasses.dataclass(eq=False)
class Pending:
    """Sums over rows since the last step.

    The rows of several backward passes are those of one large batch: their numbers N and their
    numbers of loss terms M add up. Several uses of a weight under one backward pass share one loss:
    their N add up, their M does not.

    Attributes:
        inputs: Sums over the N rows of inputs.
        N: Their number.
        outputs: Sums over the rows of output gradients.
        M: Terms of the losses of earlier backward passes.
        M_now: Terms of the loss of the current one.
        backward: Which backward pass that is.
    """

    inputs: Measured
    N: int
    outputs: Measured
    M: int
    M_now: int
    backward: int

    def add(self, other: Pending, *, mean: bool) -> Pending:
        """With the rows of one more use; `mean` if the loss is a mean and not a sum."""
        same = self.backward == other.backward
        return Pending(
            self.inputs + other.inputs,
            self.N + other.N,
            self.outputs + other.outputs,
            self.M if same or not mean else self.M + self.M_now,
            max(self.M_now, other.M_now) if same else other.M_now,
            other.backward,
        )

    def curvature(self, grad_scale: Any) -> Curvature:
        """The curvature, of gradients that were multiplied by `grad_scale`."""
        M = self.M + self.M_now
        return Curvature.of(self.inputs, self.N, self.outputs, M / (grad_scale * grad_scale))
