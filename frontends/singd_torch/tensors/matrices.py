"""Lists of matrices that the core takes for one array."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from singd_core._array import is_half
from singd_core._kernels import Kernels


class Matrices(list[Tensor]):
    """Matrices, or stacks of them along first axes, of any shapes."""

    def norms(self) -> Tensor:
        """The Frobenius norms of all, in a row."""
        return norms_of([m for own in self for m in own.reshape(-1, *own.shape[-2:]).unbind(0)])


def norms_of(tensors: Sequence[Tensor], order: int = 2) -> Tensor:
    """The norm of each, in a row, in at least float32."""
    dtype = torch.float32 if any(map(is_half, tensors)) else None
    return torch.stack(torch._foreach_norm(list(tensors), order, dtype))


KERNELS = Kernels(norm=lambda matrices, axes: matrices.norms())
