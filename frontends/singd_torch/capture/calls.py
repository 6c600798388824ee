"""Rows from calls of torch's functions that are handed a weight itself, whoever makes them.

A subclass of a known layer may do more in its `forward` than the layer, and a weight may be used
without its module, as a table of embeddings is by `F.linear(h, embedding.weight)`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from singd_core.layers import LayerKind, Linear
from singd_torch.capture.handed import Handed, Homes, tensors_of
from singd_torch.capture.now import Now
from singd_torch.capture.tap import Tap
from singd_torch.layers.functions import Reading, View, asks_no_numbers, reading, views
from singd_torch.layers.kinds import hooks_of_all
from singd_torch.layers.layer import Layer


class Calls:
    """The calls that are handed the weights of an optimizer: probed where they are its layers'.

    Attributes:
        now: What is so at this moment.
        handed: Which parameters of layers tensors are.
    """

    def __init__(self, owner: Any, layers: Iterable[Layer], homes: Homes, now: Now) -> None:
        """`owner.rows_wanted` is asked for each call; layers learn what else uses them."""
        self._owner, self.now = weakref.ref(owner), now
        parameters = {p: layer for layer in layers if layer.is_open for p in layer.parameters}
        self._layers = {id(p): layer for p, layer in parameters.items()}
        self._taps: dict[tuple[Layer, LayerKind, bool, int | None], Tap | None] = {}
        self._known: dict[int, tuple[Layer, Tap, Tensor | None]] = {}
        self.handed = Handed(parameters, homes)

    def has_probed(self, weight: Tensor) -> bool:
        """Whether the last call, which a module has made, was handed a weight and probed."""
        probed = self.now.probed
        self.now.settle(weight)
        return probed is weight

    def run(
        self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], mode: _Mode
    ) -> Any:
        """Call a function that is handed a weight, a bias or the transpose of a weight."""
        output = function(*args, **kwargs)
        if mode is not self.now.mode or not torch.is_grad_enabled():
            return output  # an inner mode has seen the call
        if torch._C._are_functorch_transforms_active():
            return output
        known = self._known_tap(function, args, kwargs, mode)
        if known is not None:
            self.now.settle()
            return self._probed(*known, args[0], output, None, function, mode)
        view = mode.view_of(args[0]) if args else None
        whole = view is not None and self._is_whole(view.weight)
        shown = views(function, args, kwargs, output, view, whole=whole)
        if shown is not None:
            for tensor, view in shown:
                mode.know_view(tensor, view)
            return output
        self.now.settle()
        found = reading(function, args, kwargs, mode.view_of)
        layer = None if found is None else self._layers.get(id(found.view.weight))
        if found is None or layer is None or found.x is found.handed:  # as of W @ W
            self._lose(function, args, kwargs, output, mode, ())
            return output
        bias_view = None if found.bias is None else mode.view_of(found.bias)
        bias = found.bias if bias_view is None else bias_view.weight
        tap = self._tap(layer, found, biased=layer.bias is None or bias is layer.bias)
        both = tap is None and layer.is_stack and found.kind.is_plain
        own_bias = found.bias if bias is layer.bias else None
        explained = (found.handed, own_bias) if tap is not None or both else ()
        self._lose(function, args, kwargs, output, mode, explained)
        if both and _needs_gradient(output, found.handed):
            layer.lose_rows("used both plain and transposed")
        if tap is None:
            return output
        is_plain = self.handed.is_of(found.handed) is layer.weight
        is_plain = is_plain and self.handed.is_of(found.bias) is layer.bias
        if function is F.linear and is_plain:
            self._known[id(found.handed)] = layer, tap, found.bias
        return self._probed(layer, tap, found.x, output, found.rows, function, mode)

    def _known_tap(
        self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], mode: _Mode
    ) -> tuple[Layer, Tap] | None:
        """What is known of `F.linear(x, weight, bias)`, the most frequent call, from one before."""
        if function is not F.linear or kwargs or len(args) < 2:
            return None
        known = self._known.get(id(args[1]))
        given = args[2] if len(args) > 2 else None
        if known is None or mode.view_of(args[0]) is not None:
            return None
        layer, tap, bias = known
        return (layer, tap) if given is bias else None

    def _probed(
        self,
        layer: Layer,
        tap: Tap,
        x: Tensor,
        output: Any,
        rows: Any,
        function: Callable[..., Any],
        mode: _Mode,
    ) -> Any:
        """The output of a call of a layer, probed if rows can be had."""
        if not isinstance(output, Tensor):
            return output
        if not mode.is_at_home():  # what is checkpointed here will be called again without a mode
            reason = f"used by {_name(function)} in a function that is checkpointed"
            self.now.doubtful = layer, reason
            if not layer.has_module(tap.source):
                self.now.settle()
            return output
        probed = tap.probed(x, output, rows)
        if probed is None:
            return output
        self.now.probed = layer.weight
        return probed

    def _is_whole(self, parameter: Tensor) -> bool:
        """Whether a parameter may not be seen in parts or transposed."""
        layer = self._layers.get(id(parameter))
        if layer is None or parameter is layer.bias:
            return True
        return not (parameter.ndim == 2 or layer.is_stack)

    def _tap(self, layer: Layer, found: Reading, *, biased: bool) -> Tap | None:
        """What probes calls of this kind, or None if they give no rows of the layer."""
        key = layer, found.kind, biased, found.view.part
        if key not in self._taps:
            if layer.is_unturned and found.kind == Linear(transposed=True):
                self._owner().turn(layer)  # type: ignore[union-attr]
            source = layer.source(found.kind, biased=biased, part=found.view.part)
            if source is not None:
                layer.know(source)
            self._taps[key] = None if source is None else Tap(self._owner(), source)
        return self._taps[key]

    def _lose(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        output: Any,
        mode: _Mode,
        explained: Sequence[Tensor | None],
    ) -> None:
        """Take no rows of layers that a call uses in another way than rows would explain."""
        for tensor in tensors_of(args, kwargs):
            view = mode.view_of(tensor)
            layer = None if view is None else self._layers.get(id(view.weight))
            if layer is None or any(tensor is other for other in explained):
                continue
            if asks_no_numbers(function, args[0] if args else None, tensor):
                continue
            if _needs_gradient(output, tensor):
                layer.lose_rows(_why(layer, view, function))


class _Mode(TorchFunctionMode):
    """While active, sees each call of a function of torch."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls, self._handed, self._ids = calls, calls.handed, set(calls.handed.of)
        self._views: dict[int, tuple[View, Tensor]] = {}
        self._home = _saved_tensors_hooks()
        self.call: FrameType | None = None

    def forget(self) -> None:
        """Be no mode of a call that goes on."""
        self._calls.now.begin()

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, ids = kwargs or {}, self._ids
        if not torch.compiler.is_compiling():
            if self._handed.is_gathered:
                self._handed.gather(args, kwargs, ids)
            for a in chain(args, kwargs.values()) if kwargs else args:
                if id(a) in ids or (type(a) in (list, tuple) and not ids.isdisjoint(map(id, a))):
                    return self._calls.run(func, args, kwargs, self)
        return func(*args, **kwargs)

    def know_view(self, tensor: Tensor, view: View) -> None:
        """Look for a view of a weight as well; it is kept, so that its id stays its own."""
        self._views[id(tensor)] = view, tensor
        self._ids.add(id(tensor))

    def view_of(self, tensor: Any) -> View | None:
        """What a tensor shows of a weight, None of other tensors."""
        if id(tensor) in self._views:
            return self._views[id(tensor)][0]
        weight = self._handed.of.get(id(tensor))
        return None if weight is None else View(weight)

    def is_at_home(self) -> bool:
        """Whether what is saved for the backward pass goes where it went when this was entered."""
        return _saved_tensors_hooks() is self._home


class Hooks:
    """Enter the mode before a call of a module and leave it after, errors included.

    Copies do nothing.
    """

    def __init__(self, owner: Any = None, now: Now | None = None) -> None:
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)
        self._now = now or Now()

    def before(self, module: nn.Module, args: Any) -> None:
        """Enter a mode, unless an outer module has entered one, which sees all calls here."""
        owner = self._owner()
        if torch.compiler.is_compiling() or owner is None:
            return
        now = self._now
        now.outer.append((module, now.mode))
        if not owner.calls_wanted() or (now.mode is not None and now.mode.is_at_home()):
            return
        now.mode = _Mode(owner.weight_calls)
        now.mode.call = sys._getframe(1)
        now.mode.__enter__()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave the mode that was entered for this call, if one was.

        Copies of the hooks may have one of both alone, or not have it called after an error.
        """
        now = self._now
        if torch.compiler.is_compiling() or all(called is not module for called, _ in now.outer):
            return
        called: Any = None
        while called is not module:
            called, outer = now.outer.pop()
            if now.mode is not None and now.mode is not outer:
                now.mode.__exit__(None, None, None)
                now.mode = outer
                now.settle()

    def __deepcopy__(self, memo: Any) -> Hooks:
        """Hooks that do nothing."""
        return Hooks()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as hooks that do nothing."""
        return Hooks, ()

    def install(self, module: nn.Module, owner: Any) -> None:
        """Hook a module until the end of the owner."""
        for handle in (
            module.register_forward_pre_hook(self.before, prepend=True),
            module.register_forward_hook(self.after, always_call=True),
        ):
            weakref.finalize(owner, handle.remove)


def modules(model: nn.Module, layers: Iterable[Layer]) -> Iterator[nn.Module]:
    """The modules whose calls may hand a weight to a function by themselves.

    torch's own modules do not use the weights of others, so a `Sequential` needs no hooks.
    """
    weights = {layer.weight for layer in layers if layer.is_open}
    by_path = dict(model.named_modules(remove_duplicate=False))
    paths = set()
    # a model may have a method of its own, of other arguments
    for name, p in nn.Module.named_parameters(model, remove_duplicate=False):
        while p in weights and name:
            name = name.rpartition(".")[0]
            paths.add(name)
    by_output = {m: source.by_output for layer in layers for m, source in layer.sources}
    for module in {id(m): m for path, m in by_path.items() if path in paths}.values():
        of_torch = type(module).__module__.startswith("torch.nn.modules.")
        is_torchs = of_torch and "forward" not in vars(module)
        if hooks_of_all() or not by_output.get(module, is_torchs):
            yield module


def _saved_tensors_hooks() -> Any:
    """What is done with tensors that are saved for the backward pass, as by a checkpoint."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks and hooks[0]


def _needs_gradient(output: Any, tensor: Tensor) -> bool:
    """Whether what a function returned depends on a tensor that it was handed, for autograd."""
    outputs = output if isinstance(output, (list, tuple)) else (output,)
    return any(isinstance(o, Tensor) and o.requires_grad and o is not tensor for o in outputs)


def _why(layer: Layer, view: View | None, function: Callable[..., Any]) -> str:
    """Why there are no rows of a layer whose weight or bias a function is handed."""
    if view is None or view.weight is not layer.bias:
        return f"used by {_name(function)}"
    given = f"used with a bias that {_name(function)} is handed alone"
    return f"{given} (hand both to one call, such as F.linear)"


def _name(function: Callable[..., Any]) -> str:
    return str(resolve_name(function) or getattr(function, "__name__", function))
