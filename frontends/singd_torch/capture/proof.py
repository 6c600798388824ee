"""Whether the rows of a backward pass tell the gradient: compiled code may use a weight unseen."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from singd_core._array import widen
from singd_torch.layers.layer import Layer, Source


@dataclasses.dataclass
class Proof:
    """The sum of Bᵀ A of one backward pass, for a weight whose gradient that should be.

    Attributes:
        backward: The backward pass.
        before: The gradient before it, None if there was none.
        entries: How many an index has, if the weight is a table.
        product: The sum.
        terms: The size of what was summed up.
        eps: The rounding of the coarsest numbers in it.
        is_void: Whether the gradient has parts that no proof can know.
    """

    backward: int
    before: Tensor | None
    entries: int
    product: Tensor | float = 0.0
    terms: Tensor | float = 0.0
    eps: float = 0.0
    is_void: bool = False

    @classmethod
    def of(cls, layer: Layer, backward: int) -> Proof:
        """The beginning of one."""
        grad = layer.weight.grad
        return cls(backward, None if grad is None else grad.clone(), layer.weight.shape[0])

    def add(self, source: Source, x: Tensor, g: Tensor) -> None:
        """Add the rows of a call."""
        kind, wide = source.kind, widen(g.reshape(-1, g.shape[-1]))
        self.eps = max(self.eps, torch.finfo(g.dtype).eps)
        if kind.diagonal_inputs:
            at = x.flatten().long()
            if kind.no_row is not None:
                wide = wide * (at != kind.no_row)[:, None]
            product = wide.new_zeros(self.entries, wide.shape[-1]).index_add_(0, at, wide)
            size = wide.norm()
        else:
            inputs = widen(x.reshape(-1, x.shape[-1])).to(wide)
            product, size = inputs.mT @ wide, inputs.norm() * wide.norm()
            self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        self.product = self.product + (product if kind.is_turned else product.mT)
        self.terms = self.terms + size

    def fails(self, layer: Layer) -> bool:
        """Whether a tenth of the gradient of the weight, beyond rounding, is of something else."""
        grad = layer.weight.grad
        if self.is_void or grad is None or not isinstance(self.product, Tensor):
            return False
        gradient = widen(grad) if self.before is None else widen(grad) - widen(self.before)
        gap, norm = (self.product.to(gradient) - gradient).norm(), gradient.norm()
        rounding = 8 * self.eps * (self.terms + norm)
        return bool(gap > 0.1 * norm + rounding)  # NaN is no failure


def can_be_proved(layer: Layer) -> bool:
    """Whether the gradient of a weight is a product of rows that costs as much as that gradient."""
    hooks = layer.weight._backward_hooks, layer.weight._post_accumulate_grad_hooks
    kinds = (layer.kind, *(source.kind for _, source in layer.sources))
    return not any(hooks) and all(kind.is_plain for kind in kinds)
