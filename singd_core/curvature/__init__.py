"""The rows of a layer: what its Kronecker-factored curvature is made of."""

from singd_core.curvature._sampling import Sample
from singd_core.curvature.base import LayerKind
from singd_core.curvature.convolution import Convolution
from singd_core.curvature.embedding import Embedding
from singd_core.curvature.linear import Linear
from singd_core.curvature.stacked import StackedLinear
from singd_core.curvature.tensor import Tensor
from singd_core.curvature.transposed import TransposedConvolution

__all__ = [
    "Convolution",
    "Embedding",
    "LayerKind",
    "Linear",
    "Sample",
    "StackedLinear",
    "Tensor",
    "TransposedConvolution",
]
