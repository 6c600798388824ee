"""The authors' package `singd` 0.0.5, made comparable where it must be."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from singd.optim import optimizer as theirs
from singd.structures import blockdiagonal, hierarchical, triltoeplitz, triutoeplitz
from singd.structures.base import StructuredMatrix
from singd.structures.blockdiagonal import BlockDiagonalMatrixTemplate
from torch import Tensor

__all__ = ["STRUCTURES", "Reference", "corrected", "in_float64", "reference"]

Reference = theirs.SINGD
StructuredMatrix.WARN_NAIVE = False  # Toeplitz traces and norms are naive there, and say so

STRUCTURES = tuple(Reference.SUPPORTED_STRUCTURES)


def reference(*args: Any, **kwargs: Any) -> Reference:
    """The authors' optimizer, without its warning that alpha1 is ignored by kfac_like."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Parameter group .* has kfac_like=True")
        return Reference(*args, **kwargs)


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Two methods of the authors' block-diagonal matrices as their own docstrings define them.

    `rmatmat`, "multiply with the transpose", returns `self @ mat`. `from_inner()`, "the blocks of
    `self.T @ self`", returns the blocks of `self @ self.T`. Symmetric blocks alone give the same,
    but K (I − β m) is not symmetric from the second step on.
    """
    cls = BlockDiagonalMatrixTemplate
    from_inner = cls.from_inner

    def transposed(self: Any) -> Any:
        return type(self)(self._blocks.mT, self._last.mT)

    def rmatmat(self: Any, mat: Tensor) -> Tensor:
        return transposed(self) @ mat

    def inner(self: Any, X: Tensor | None = None) -> Any:
        return from_inner(transposed(self)) if X is None else from_inner(self, X)

    with mock.patch.object(cls, "rmatmat", rmatmat), mock.patch.object(cls, "from_inner", inner):
        yield


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Let the authors' structures compute in float64, which four of the six refuse.

    They choose the dtype of a product with `lowest_precision`, which knows no float64. Here both
    factors have one dtype, and no other line of theirs depends on it.
    """

    def lowest_precision(first: torch.dtype, second: torch.dtype) -> torch.dtype:
        assert first == second
        return first

    with contextlib.ExitStack() as stack:
        for module in (blockdiagonal, hierarchical, triltoeplitz, triutoeplitz):
            stack.enter_context(mock.patch.object(module, "lowest_precision", lowest_precision))
        yield
