"""Structured inverse-free natural gradient descent (SINGD) on any array library."""

from singd_core._settings import RECIPES, Settings, settings
from singd_core.curvature import Convolution, Linear
from singd_core.optimizer import Optimizer
from singd_core.structures import Structure, get, names, register, structure
from singd_core.updates.adamw import Fallback

__all__ = [
    "RECIPES",
    "Convolution",
    "Fallback",
    "Linear",
    "Optimizer",
    "Settings",
    "Structure",
    "get",
    "names",
    "register",
    "settings",
    "structure",
]
