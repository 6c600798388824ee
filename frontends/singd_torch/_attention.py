"""Rows from inside the fused call of nn.MultiheadAttention."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singd_core.curvature import Linear
from singd_torch._capture import probed
from singd_torch._layers import Source

_ORIGINAL = F.multi_head_attention_forward
_LINEAR = Linear()


class _Fused(TorchFunctionMode):
    """While active, the fused call runs with projections that are probed.

    It runs as a copy of torch's function whose three helpers are replaced: nothing of torch is
    patched, and the mathematics of attention stays torch's.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._owner = owner
        self._batch = 1

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _ORIGINAL:
            helpers = {
                "linear": self._linear,
                "_in_projection": self._in_projection,
                "_in_projection_packed": self._in_projection_packed,
            }
            namespace = {**_ORIGINAL.__globals__, **helpers}
            code, name, defaults = _ORIGINAL.__code__, _ORIGINAL.__name__, _ORIGINAL.__defaults__
            func = types.FunctionType(code, namespace, name, defaults)
        return func(*args, **(kwargs or {}))

    def _probed(self, source: Source, x: Tensor, output: Tensor) -> Tensor:
        """The layout inside is (sequence, batch, ...), or (sequence · batch, ...) at the end."""

        def batch_first(t: Tensor) -> Tensor:
            shape = (-1, self._batch, t.shape[-1])
            return t.reshape(shape).transpose(0, 1)

        new = probed(self._owner, source, x, output, batch_first)
        return output if new is None else new

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._probed(Source(weight, _LINEAR), x, F.linear(x, weight, bias))

    def _in_projection(self, *args: Tensor) -> tuple[Tensor, ...]:
        qkv, weights, biases = args[:3], args[3:6], args[6:] or (None,) * 3
        self._batch = qkv[0].shape[1]
        return tuple(map(self._linear, qkv, weights, biases))

    def _in_projection_packed(
        self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        self._batch = q.shape[1]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        outputs = []
        for i, (x, W, b) in enumerate(zip((q, k, v), weight.chunk(3), biases, strict=True)):
            outputs.append(self._probed(Source(weight, _LINEAR, part=i), x, F.linear(x, W, b)))
        return tuple(outputs)


class _Hooks:
    """Enters the mode before a call of the module and leaves it after, errors included."""

    def __init__(self, owner: Any) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._entered: list[_Fused] = []

    def before(self, module: nn.MultiheadAttention, args: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [module.out_proj.weight, *(getattr(module, name) for name in names)]
        sources = [Source(weight, _LINEAR) for weight in weights if weight is not None]
        if all(owner.rows_wanted(source) is None for source in sources):
            return
        mode = _Fused(owner)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._entered.append(mode)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> _Hooks:
        return _Hooks(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hooks, (None,)


def install(owner: Any, module: nn.MultiheadAttention) -> None:
    """Watch the fused call of a module until the end of the owner."""
    hooks = _Hooks(owner)
    for handle in (
        module.register_forward_pre_hook(hooks.before),
        module.register_forward_hook(hooks.after, always_call=True),
    ):
        weakref.finalize(owner, handle.remove)
