"""SINGD for JAX: an optax optimizer for unmodified models."""

from singd_core import __version__
from singd_jax._accumulate import MultiSteps
from singd_jax._check import check
from singd_jax._curvature import value_and_curvature
from singd_jax._find import find_layers
from singd_jax._gradients import Gradients, value_and_grad
from singd_jax._layer import Layer
from singd_jax._layers import Layers
from singd_jax._pytree import register_trees
from singd_jax._state import SingdState, flatten, unflatten
from singd_jax._torch import from_torch
from singd_jax._transform import scale_by_singd, singd

__all__ = [
    "Gradients",
    "Layer",
    "Layers",
    "MultiSteps",
    "SingdState",
    "__version__",
    "check",
    "find_layers",
    "flatten",
    "from_torch",
    "scale_by_singd",
    "singd",
    "unflatten",
    "value_and_curvature",
    "value_and_grad",
]

register_trees()
