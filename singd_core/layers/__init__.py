"""The rows of a layer: what its Kronecker-factored curvature is made of."""

from singd_core.layers._sampling import Sample
from singd_core.layers.base import LayerKind
from singd_core.layers.convolution import Convolution
from singd_core.layers.embedding import Embedding
from singd_core.layers.linear import Linear
from singd_core.layers.stacked import StackedLinear
from singd_core.layers.tensor import Tensor
from singd_core.layers.transposed import TransposedConvolution

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
