"""What the tests of the jax frontend share."""

import os
from importlib import metadata

# XLA's CPU compiler dominates these tests: without its optimizer a step of SINGD compiles in 0.4 s
# in place of 3. The flags are those of the pinned jaxlib; another one may not know them.
if metadata.version("jaxlib").startswith("0.10."):
    _FAST = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}"
