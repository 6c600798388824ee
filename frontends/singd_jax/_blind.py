"""The curvature of a layer that is measured with K = C = I."""

from __future__ import annotations

from typing import TypeAlias

from singd_core import curvature
from singd_core._array import Array
from singd_core._tree import Tree, tree
from singd_core.structures.base import Structure


@tree
class Blind(Tree):
    """The curvature U ⊗ G as the structures keep it, for a refresh to see by K and C.

    Its traces are taken where they are wanted, in a refresh. In every step they would be half of
    the kernels that the curvature of a layer takes.

    Attributes:
        H_K: Π̂(U).
        H_C: Π̂(G).
    """

    H_K: Structure
    H_C: Structure

    @property
    def t_U(self) -> Array:
        """The mean diagonal entry of U, of the batch axes' shape, in at least float32."""
        return self.H_K.trace() / max(1, self.H_K.shape[-1])

    @property
    def t_G(self) -> Array:
        """The mean diagonal entry of G."""
        return self.H_C.trace() / max(1, self.H_C.shape[-1])

    def with_traces(self) -> curvature.Curvature:
        """The same as the core keeps it."""
        return curvature.Curvature(self.H_K, self.H_C, self.t_U, self.t_G)

    def joined(self, other: Blind) -> curvature.Curvature:
        """As the core's: one Kronecker product near the sum of two."""
        return self.with_traces().joined(other.with_traces())


Curvature: TypeAlias = curvature.Curvature | Blind
