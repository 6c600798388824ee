"""The curvature of one layer, summed over the uses of its weight until the next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from singd_core.curvature import Measured
from singd_core.layers import LayerKind, Sample
from singd_core.rules import Factors
from singd_torch.tensors.join import join, join_trees, tree_parts
from singd_torch.tensors.pieces import brought, narrowed, placed


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
        diagonal: bool,
        kfac_approx: str,
        loss_average: str | int | None,
        mask: Tensor | None,
        sample: tuple[Sample | None, Sample | None] = (None, None),
    ) -> Rows:
        """From the input of a call and the gradient at its output.

        `diagonal` if only the diagonal of AᵀA is asked for.
        `mask`, of the first axes of the positions, is False at those that are no rows, such as
        padding. The channels and pixels of a convolution are no positions, so it has no mask.
        `sample`, of the inputs and of the gradients, is which rows are made; None is all.
        """
        of_inputs, of_outputs = sample
        positions, no_row = kind.positions(x), kind.no_row
        if mask is None or not begins_as(positions, mask) or 0 in positions:
            inputs_of = kind.diagonal_rows if diagonal else kind.inputs
            A, N = inputs_of(x, bias=bias, kfac_approx=kfac_approx, sample=of_inputs)
            B, M = kind.outputs(
                g, kfac_approx=kfac_approx, loss_average=loss_average, sample=of_outputs
            )
            return cls(A, N, B, M)
        mask = mask.reshape(*mask.shape, *(1,) * (len(positions) - mask.ndim)).expand(positions)
        used = mask.reshape(len(mask), -1).any(1)  # samples with a position that is kept
        kept, samples = mask.sum(), used.sum()
        each = no_row is not None or kfac_approx == "expand"  # a row for each position
        if no_row is not None:
            x = x.where(mask, no_row)
        elif not each:  # the mean over the kept positions of each sample
            share = mask.reshape(len(mask), -1).to(x.dtype).mean(1).clamp(min=1 / mask[0].numel())
            x = x * (mask / share.reshape(-1, *(1,) * (mask.ndim - 1)))[..., None]
        A, N = kind.inputs(x, bias=bias, kfac_approx=kfac_approx, sample=of_inputs)
        masked_g = g if each else g * mask[..., None]
        B, M = kind.outputs(
            masked_g, kfac_approx=kfac_approx, loss_average=loss_average, sample=of_outputs
        )
        if no_row is None:
            A = A * _thinned(mask if each else used, of_inputs)
        if each:
            B = B * _thinned(mask, of_outputs)
        terms = {"batch": samples, "batch+sequence": kept}.get(loss_average, M)  # type: ignore[arg-type]
        return cls(A, kept if each else samples, B, terms)

    def kept(self, lent: Sequence[Tensor]) -> Rows:
        """The same rows, copied where they are in the memory of what they were made of."""
        theirs = {tensor.untyped_storage().data_ptr() for tensor in lent}
        A, B = (
            rows.clone() if rows.untyped_storage().data_ptr() in theirs else rows
            for rows in (self.A, self.B)
        )
        return dataclasses.replace(self, A=A, B=B)


def begins_as(positions: tuple[int, ...] | None, mask: Tensor) -> TypeGuard[tuple[int, ...]]:
    """Whether the first axes of positions are those of a mask; positions may be None."""
    return positions is not None and positions[: mask.ndim] == mask.shape


def _thinned(mask: Tensor, sample: Sample | None) -> Tensor:
    """The mask of rows as a column, of those that are sampled."""
    mask = mask[..., None] if sample is None else sample.rows(mask[..., None])[0]
    return mask.reshape(-1, 1)


@dataclasses.dataclass(eq=False)
class Pending:
    """Sums over rows since the last step.

    The rows of several backward passes count as one large batch: their numbers N and their
    numbers of loss terms M add up. Several uses of a weight under one backward pass share one loss:
    their N add up, their M does not.

    Attributes:
        inputs: Sums over the N rows of K.
        N: The number of inputs.
        outputs: Sums over the rows of C.
        M: Terms of the losses of earlier backward passes.
        M_now: Terms of the loss of the current one.
        backward: Which backward pass that is.
        swapped: Whether K has the rows of output gradients.
    """

    inputs: Measured
    N: Any
    outputs: Measured
    M: Any
    M_now: Any
    backward: int
    swapped: bool

    @classmethod
    def measured(
        cls,
        factors: Sequence[Factors],
        rows: Sequence[Rows],
        backward: int,
        *,
        swapped: bool,
        autocast: bool = False,
    ) -> list[Pending]:
        """The sums over the rows of each call, measured as one: the calls are of equal layers.

        With `autocast`, products are in bfloat16, and the sums in the dtype of the factors.
        """
        A, B = join([call.A for call in rows]), join([call.B for call in rows])
        joined: Any = join_trees([own.measuring() for own in factors])
        by = joined
        if autocast:
            by = dataclasses.replace(joined, K=narrowed(joined.K), C=narrowed(joined.C))
        inputs, outputs = by.measure(*((B, A) if swapped else (A, B)))
        if by is not joined:
            like = torch.empty(0, dtype=torch.float32, device=A.device)
            inputs, outputs = (
                dataclasses.replace(own, S=own.S.astype(like)) for own in (inputs, outputs)
            )
        sums = zip(tree_parts(inputs, len(rows)), tree_parts(outputs, len(rows)), strict=True)
        return [
            cls(own_inputs, call.N, own_outputs, 0, call.M, backward, swapped)
            for call, (own_inputs, own_outputs) in zip(rows, sums, strict=True)
        ]

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

    def joins(self, other: Pending) -> bool:
        """Whether both are of as many rows, or of numbers that the host does not know."""
        pairs = zip(self._counts(), other._counts(), strict=True)
        return all(
            isinstance(a, Tensor) if isinstance(b, Tensor) else a is b or a == b for a, b in pairs
        )

    @classmethod
    def joined(cls, several: Sequence[Pending]) -> Pending:
        """The rows of equal layers, along a first axis."""
        first, *others = several
        if not others:
            return first
        N, M = (
            torch.stack(n) if isinstance(n[0], Tensor) else n[0]
            for n in zip(*(pending._counts() for pending in several), strict=True)
        )
        inputs, outputs = (
            join_trees([p.inputs for p in several]),
            join_trees([p.outputs for p in several]),
        )
        return cls(inputs, N, outputs, 0, M, first.backward, first.swapped)

    def terms(self, grad_scale: Any) -> tuple[Measured, Any, Measured, Any]:
        """What `Curvature.of` takes, of gradients that were multiplied by `grad_scale`."""
        dtype = self.inputs.squares.dtype  # else integers on the device are divided in float32
        N, M, grad_scale = (  # of no rows all sums are 0
            n.to(dtype).masked_fill(n == 0, 1.0) if isinstance(n, Tensor) else n or 1
            for n in (*self._counts(), grad_scale)
        )
        M = M / grad_scale / grad_scale  # its square may leave float32
        if self.swapped:
            return self.inputs, 1.0 / M, self.outputs, 1.0 / N
        return self.inputs, N, self.outputs, M

    def tensors(self) -> list[Tensor]:
        """All sums as tensors, in a fixed order."""
        arrays = [a for part in (self.inputs, self.outputs) for _, a in part.named_arrays()]
        like = self.inputs.squares
        counts = [placed(n, like.dtype, like.device) for n in self._counts()]
        return [*arrays, *counts]

    def of_all(self, sums: Sequence[Tensor], processes: int, *, mean: bool) -> Pending:
        """The pending rows of all processes, from the sums of their `tensors`.

        The averaged gradients belong to a loss divided by the number of processes.
        """
        *arrays, N, M = sums
        split = len(list(self.inputs.named_arrays()))
        inputs, outputs = self.inputs.rebuild(arrays[:split]), self.outputs.rebuild(arrays[split:])
        M = (M if mean else torch.ones_like(M)) / processes**2
        return Pending(inputs, N.clamp(min=1), outputs, 0, M, self.backward, self.swapped)

    def on(self, device: torch.device) -> Pending:
        """The same on a device."""
        if self.inputs.squares.device == device:
            return self
        inputs, outputs = (sums.map(lambda a: a.to(device)) for sums in (self.inputs, self.outputs))
        return brought(dataclasses.replace(self, inputs=inputs, outputs=outputs), device)

    def sent(self) -> Pending:
        """What is left when its sums were sent: more calls of its pass are of the same loss."""
        inputs, outputs = (
            sums.map(lambda a: a.new_zeros(()).expand(a.shape))
            for sums in (self.inputs, self.outputs)
        )
        return Pending(inputs, 0, outputs, 0, 0, self.backward, self.swapped)

    def _counts(self) -> tuple[Any, Any]:
        return self.N, self.M + self.M_now


def part_of(factors: Factors, part: int | None) -> Factors:
    """The factors of one part of a stacked layer, or of the whole layer."""
    return factors if part is None else factors.map(lambda a: a[part])
