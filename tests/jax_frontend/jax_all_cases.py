"""All cases: each module adds its own."""

import jax_control_cases  # noqa: F401
import jax_convolution_cases  # noqa: F401
import jax_layout_cases  # noqa: F401
import jax_weight_cases  # noqa: F401
from jax_cases import CASES

__all__ = ["CASES"]
