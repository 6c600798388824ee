"""Structures, and all other trees of the core, as pytrees of jax: as the JAX frontend has them."""

from __future__ import annotations

import importlib


def register_trees() -> None:
    """Make every tree of the core a pytree of jax, those included that are defined later."""
    importlib.import_module("singd_jax._pytree").register_trees()
