"""The pure optimizer, where the arrays are and in the precision that sums need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import singd_core
from singd_core._array import cast, widen
from singd_core._tree import Tree, each
from singd_cupy import _cuda


class Optimizer(singd_core.Optimizer):
    """`singd_core.Optimizer` on CuPy arrays; arguments and methods are the same.

    - The computations for a parameter run on the device of its weight, on the current stream of
      this device. The state of the parameter stays there. Parameters may lie on several devices.
      The current device does not change, and the host waits for nothing.
    - Arrays in float16 and bfloat16 are storage: they are cast to float32 while their parameter is
      computed. The results are stored in the dtypes that the core gives them.
    - Arrays of torch and jax come in through `singd_cupy.from_dlpack`.

    Raises:
        TypeError: From the methods, if an array is no CuPy array.

    Example:
        >>> import cupy as cp
        >>> x, y = cp.ones((8, 3), cp.float32), cp.ones((8, 2), cp.float32)
        >>> params = {"map": (cp.zeros((2, 3), cp.float32), cp.zeros(2, cp.float32))}
        >>> optimizer = Optimizer(lr=0.1)
        >>> state = optimizer.init(params)
        >>> W, b = params["map"]
        >>> g = (x @ W.T + b - y) / len(x)  # gradient of the mean of ½‖z − y‖²
        >>> grads, rows = {"map": (g.T @ x, g.sum(0))}, {"map": (x, g)}
        >>> updates, state = optimizer.update(grads, state, params, rows)
        >>> params = optimizer.apply(params, updates)
    """

    def _run(
        self, function: Callable[..., Any], owner: Any, *arguments: Any, like: Any = None
    ) -> Any:
        """`function(*arguments)` on the device of its owner, in at least float32."""
        device = _cuda.device_of(_first(owner))
        with _cuda.at(device):
            result = function(*each(lambda x: widen(_cuda.moved(x, device)), arguments))
            return result if like is None else each(cast, result, like)


def _first(owner: Any) -> Any:
    """Any array of a parameter or of its state."""
    if isinstance(owner, Tree):
        return next(owner.named_arrays())[1]
    return owner[0] if isinstance(owner, tuple) else owner
