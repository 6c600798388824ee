"""Structured inverse-free natural gradient descent (SINGD) on any array library."""

from singd_core import rules, structures
from singd_core._check import check
from singd_core._recipes import RECIPES, settings
from singd_core._settings import Settings
from singd_core._version import __version__
from singd_core.adamw import Fallback
from singd_core.layers import (
    Convolution,
    Embedding,
    LayerKind,
    Linear,
    StackedLinear,
    TransposedConvolution,
)
from singd_core.optimizer import Optimizer
from singd_core.state import flatten, unflatten
from singd_core.structures import Structure, structure

__all__ = [
    "RECIPES",
    "Convolution",
    "Embedding",
    "Fallback",
    "LayerKind",
    "Linear",
    "Optimizer",
    "Settings",
    "StackedLinear",
    "Structure",
    "TransposedConvolution",
    "__version__",
    "check",
    "flatten",
    "rules",
    "settings",
    "structure",
    "structures",
    "unflatten",
]
