"""Warnings that point at the line of the user."""

import os
import sys
import warnings
from collections.abc import Sequence

import torch

_INSIDE = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


def warn(text: str) -> None:
    """Warn at the innermost line outside of this package and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def listed(names: Sequence[str]) -> str:
    """The first two of names, and how many more there are."""
    few = [repr(name) for name in names[:2]]
    if len(names) > 2:
        return f"{', '.join(few)} and {len(names) - 2} more"
    return " and ".join(few)
