"""Warnings that point at the line of the user."""

import sys
import warnings

# Whose lines are passed over: the user called one of them.
_INSIDE = {"singd_core", "singd_cupy", "singd_jax", "singd_torch", "jax", "optax", "torch"}


def warn(text: str) -> None:
    """Warn at the innermost line outside of this project and of the frameworks."""
    frame, level = sys._getframe(1), 2
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE and frame.f_back:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
