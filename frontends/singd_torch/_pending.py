"""The curvature of one layer, summed over the uses of its weight until the next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from singd_core.curvature import Embedding, LayerKind
from singd_core.preconditioner import Factors
from singd_core.updates.curvature import Curvature, Measured


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one call: A and their number N, B and the number M of terms of the loss."""

    A: Tensor
    N: Any
    B: Tensor
    M: Any

    @classmethod
    def of(
        cls,
        kind: LayerKind,
        x: Tensor,
        g: Tensor,
        *,
        bias: bool,
        kfac_approx: str,
        loss_average: str | None,
        mask: Tensor | None,
    ) -> Rows:
        """From the input of a call and the gradient at its output.

        `mask`, of the first axes of `x`, is False at positions that are no rows, such as padding.
        """
        lookup = kind.entries if isinstance(kind, Embedding) else None
        fits = mask is not None and x.shape[: mask.ndim] == mask.shape
        if mask is None or not fits or (x.ndim == mask.ndim and lookup is None):
            A, N = kind.inputs(x, bias=bias, kfac_approx=kfac_approx)
            B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average=loss_average)
            return cls(A, N, B, M)
        kept = mask.sum().clamp(min=1)
        g = g * mask[..., None]
        if lookup is not None:  # beyond the last entry nothing is counted
            x = x.where(mask, lookup)
        elif kfac_approx == "reduce":  # the mean over the kept positions of each sample
            shared = tuple(range(1, mask.ndim))
            share = mask.to(x.dtype).mean(shared, keepdim=True).clamp(min=1 / mask[0].numel())
            x = x * (mask / share)[..., None]
        A, N = kind.inputs(x, bias=bias, kfac_approx=kfac_approx)
        B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average=loss_average)
        if lookup is None and kfac_approx == "expand":
            A = A * mask.reshape(-1, 1)
        per_position = lookup is not None or kfac_approx == "expand"
        return cls(
            A, kept if per_position else N, B, kept if loss_average == "batch+sequence" else M
        )


@dataclasses.dataclass(eq=False)
class Pending:
    """Sums over rows since the last step.

    The rows of several backward passes are those of one large batch: their numbers N and their
    numbers of loss terms M add up. Several uses of a weight under one backward pass share one loss:
    their N add up, their M does not.

    Attributes:
        inputs: Sums over the N rows of K.
        N: The number of inputs.
        outputs: Sums over the rows of C.
        M: Terms of the losses of earlier backward passes.
        M_now: Terms of the loss of the current one.
        backward: Which backward pass that is.
        swapped: Whether the rows of K are those of output gradients.
    """

    inputs: Measured
    N: Any
    outputs: Measured
    M: Any
    M_now: Any
    backward: int
    swapped: bool

    @classmethod
    def of(cls, factors: Factors, rows: Rows, backward: int, *, swapped: bool) -> Pending:
        """The sums over the rows of one call."""
        A, B = (rows.B, rows.A) if swapped else (rows.A, rows.B)
        inputs, outputs = factors.measure(A, B)
        return cls(inputs, rows.N, outputs, 0, rows.M, backward, swapped)

    def add(self, new: Pending, *, mean: bool) -> Pending:
        """With the rows of one more call; `mean` if the loss is a mean and not a sum."""
        same = self.backward == new.backward
        return Pending(
            self.inputs + new.inputs,
            self.N + new.N,
            self.outputs + new.outputs,
            self.M if same or not mean else self.M + self.M_now,
            self.M_now if same else new.M_now,
            new.backward,
            self.swapped,
        )

    def curvature(self, grad_scale: Any) -> Curvature:
        """The curvature, of gradients that were multiplied by `grad_scale`."""
        M = (self.M + self.M_now) / (grad_scale * grad_scale)
        if self.swapped:
            return Curvature.of(self.inputs, 1.0 / M, self.outputs, 1.0 / self.N)
        return Curvature.of(self.inputs, self.N, self.outputs, M)

    def tensors(self) -> list[Tensor]:
        """All sums as tensors, in a fixed order."""
        arrays = [a for part in (self.inputs, self.outputs) for _, a in part.named_arrays()]
        like = self.inputs.squares
        counts = [torch.as_tensor(n, dtype=like.dtype, device=like.device) for n in self._counts()]
        return [*arrays, *counts]

    def of_all(self, sums: Sequence[Tensor], processes: int, *, mean: bool) -> Pending:
        """The pending rows of all processes, from the sums of their `tensors`.

        The averaged gradients are those of a loss divided by the number of processes.
        """
        *arrays, N, M = sums
        split = len(list(self.inputs.named_arrays()))
        inputs, outputs = self.inputs.rebuild(arrays[:split]), self.outputs.rebuild(arrays[split:])
        M = (M if mean else torch.ones_like(M)) / processes**2
        return Pending(inputs, N.clamp(min=1), outputs, 0, M, self.backward, self.swapped)

    def _counts(self) -> tuple[Any, Any]:
        return self.N, self.M + self.M_now
