"""SINGD for PyTorch: a drop-in optimizer for any model."""

from torch import Tensor, nn

from singd_core import __version__
from singd_core._kernels import register
from singd_torch._check import check
from singd_torch._estimate import Estimate, estimate
from singd_torch._pytree import register_trees
from singd_torch.layers.kinds import register_layer
from singd_torch.optimizer import SINGD
from singd_torch.tensors import kernels, matrices

register_trees()
register(kernels.KERNELS, Tensor, nn.Parameter)
register(matrices.KERNELS, matrices.Matrices)

__all__ = ["SINGD", "Estimate", "__version__", "check", "estimate", "register_layer"]
