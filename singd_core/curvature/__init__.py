"""The rows of a layer: what its Kronecker-factored curvature is made of."""

from singd_core.curvature.base import LayerKind
from singd_core.curvature.convolution import Convolution
from singd_core.curvature.linear import Linear

__all__ = ["Convolution", "LayerKind", "Linear"]
