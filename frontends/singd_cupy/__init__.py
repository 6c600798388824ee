"""SINGD on CuPy arrays: the core's optimizer with devices, streams, 16-bit storage and DLPack."""

from singd_cupy._cuda import require

require()

import cupy  # noqa: E402

from singd_core import __version__  # noqa: E402
from singd_core._kernels import register  # noqa: E402
from singd_cupy._fuse import KERNELS  # noqa: E402
from singd_cupy.dlpack import from_dlpack  # noqa: E402
from singd_cupy.optimizer import Optimizer  # noqa: E402
from singd_cupy.state import flatten, unflatten  # noqa: E402

register(KERNELS, cupy.ndarray)

__all__ = ["Optimizer", "__version__", "flatten", "from_dlpack", "unflatten"]
