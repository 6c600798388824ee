"""Rows from inside the fused call of nn.MultiheadAttention."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singd_core.layers import Linear
from singd_torch.capture.tap import Tap
from singd_torch.layers.source import Source

_FUSED = F.multi_head_attention_forward
_PACKED: Callable[..., tuple[Tensor, ...]] = _FUSED.__globals__["_in_projection_packed"]
_NAMES = tuple(inspect.signature(_FUSED).parameters)


@dataclasses.dataclass(frozen=True)
class _Projection:
    """Stands for a weight in the fused call, which only hands it on to the helpers below."""

    weight: Tensor
    taps: Sequence[Sequence[Tap]]  # of each part, for all optimizers
    batch: int


class _Active(threading.local):
    """The modes that are entered in one thread, of all modules and optimizers."""

    def __init__(self) -> None:
        self.modes: list[_Fused] = []


_ACTIVE = _Active()


def _linear(x: Tensor, projection: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(projection, _Projection):
        return F.linear(x, projection, bias)
    output = F.linear(x, projection.weight, bias)
    return _probed(projection.taps[0], projection.batch, x, output)


def _in_projection(*args: Any) -> tuple[Tensor, ...]:
    biases = args[6:] or (None,) * 3
    return tuple(_linear(*each) for each in zip(args[:3], args[3:6], biases, strict=True))


def _in_projection_packed(
    q: Tensor, k: Tensor, v: Tensor, projection: Any, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    if not isinstance(projection, _Projection):
        return _PACKED(q, k, v, projection, bias)
    weights = projection.weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    outputs = []
    for taps, x, W, b in zip(projection.taps, (q, k, v), weights, biases, strict=True):
        outputs.append(_probed(taps, projection.batch, x, F.linear(x, W, b)))
    return tuple(outputs)


def _probed(taps: Sequence[Tap], batch: int, x: Tensor, output: Tensor) -> Tensor:
    """The layout inside is (sequence, batch, ...), or (sequence · batch, ...) at the end."""

    def batch_first(t: Tensor) -> Tensor:
        return t.reshape(-1, batch, t.shape[-1]).transpose(0, 1)

    for tap in taps if batch else ():
        new = tap.probed(batch_first(x), batch_first(output))
        output = output if new is None else new.transpose(0, 1).reshape(output.shape)
    return output


# Nothing of torch is patched, and the mathematics of attention stays torch's.
_HELPERS = {
    "linear": _linear,
    "_in_projection": _in_projection,
    "_in_projection_packed": _in_projection_packed,
    # Other modes, such as a default device's, see what is inside and not the projections.
    "has_torch_function": lambda tensors: False,
}
_COPY = types.FunctionType(
    _FUSED.__code__, _FUSED.__globals__ | _HELPERS, _FUSED.__name__, _FUSED.__defaults__
)


class _Fused(TorchFunctionMode):
    """While active, a copy of torch's function runs whose projections are probed."""

    def __init__(self, taps: dict[str, list[Tap]], module: nn.MultiheadAttention) -> None:
        super().__init__()
        self._taps, self._module = taps, module
        self.call: types.FrameType | None = None

    def forget(self) -> None:
        """Be no mode of a call that goes on."""
        _ACTIVE.modes.remove(self)

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not _FUSED:
            return func(*args, **(kwargs or {}))
        call = dict(zip(_NAMES, args)) | kwargs  # noqa: B905 - the other names are in kwargs
        query = call["query"]
        batch = query.shape[1] if query.ndim == 3 else 1
        active = [mode._taps for mode in _ACTIVE.modes if mode._module is self._module]
        for name in self._taps:
            own = [taps[name] for taps in active if self._is_own(taps[name], name, call[name])]
            if own:
                taps = [list(each) for each in zip(*own, strict=True)]
                call[name] = _Projection(call[name], taps, batch)
        return _COPY(**call)

    def _is_own(self, taps: Sequence[Tap], name: str, weight: Any) -> bool:
        """Whether the weight of a call is the module's and that of the taps.

        It is not where a subclass computes it, or hooks were copied to another module.
        """
        if torch.compiler.is_compiling():
            return weight is not None
        if name == "out_proj_weight":
            own = getattr(getattr(self._module, "out_proj", None), "weight", None)
        else:
            own = getattr(self._module, name, None)
        return weight is own and taps[0].is_of(own)


class _Hooks:
    """Enters the mode before a call of the module and leaves it after, errors included."""

    def __init__(self, taps: dict[str, list[Tap]]) -> None:
        self._taps = taps

    def before(self, module: Any, args: Any) -> None:
        if any(tap.wanted() for taps in self._taps.values() for tap in taps):
            mode = _Fused(self._taps, module)
            if not torch.compiler.is_compiling():
                mode.call = sys._getframe(1)
            mode.__enter__()  # type: ignore[no-untyped-call]
            _ACTIVE.modes.append(mode)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        called = [mode for mode in _ACTIVE.modes if mode._module is module]
        entered = [mode for mode in called if mode._taps is self._taps]
        if entered:
            mode = entered[-1]
            mode.forget()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> _Hooks:
        return _Hooks({})

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hooks, ({},)


def sources(module: nn.MultiheadAttention) -> dict[str, list[Source | None]]:
    """What rows the fused call has, by the arguments that are weights; None of computed weights."""

    def source(owner: nn.Module, name: str, part: int | None = None) -> Source | None:
        weight = owner._parameters.get(name)
        return None if weight is None else Source(weight, Linear(), part=part, name=name)

    found = {"out_proj_weight": [source(module.out_proj, "weight")]}
    if module._qkv_same_embed_dim:
        found["in_proj_weight"] = [source(module, "in_proj_weight", part) for part in range(3)]
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            found[name] = [source(module, name)]
    return found


def install(owner: Any, module: nn.MultiheadAttention) -> list[Tap]:
    """Tap the fused call of a module until the end of the owner."""
    taps = {name: [Tap(owner, one) for one in each] for name, each in sources(module).items()}
    hooks = _Hooks(taps)
    for handle in (
        module.register_forward_pre_hook(hooks.before),
        module.register_forward_hook(hooks.after, always_call=True),
    ):
        weakref.finalize(owner, handle.remove)
    return [tap for several in taps.values() for tap in several]


def follow(taps: Sequence[Tap], module: nn.MultiheadAttention) -> None:
    """Let the taps of a module watch the weights that it has now."""
    for tap, source in zip(taps, chain(*sources(module).values()), strict=True):
        tap.watch(source)
