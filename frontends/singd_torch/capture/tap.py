"""Getting the rows of a layer from the calls of its modules, without changing the model."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from singd_torch._uncompiled import uncompiled
from singd_torch.capture import compiled
from singd_torch.layers.kinds import kind_of, methods
from singd_torch.layers.reach import Reach
from singd_torch.sharding import is_in_parts
from singd_torch.tensors.exact import without_autocast

# Takes the input of a call, the gradient of the loss at its output, which product it was, and the
# first backward pass that brought rows of it, None in compiled code. Returns whether it took them.
TakeRows: TypeAlias = Callable[[Tensor, Tensor, Any, int | None], bool]


# Why there are no rows of a call that has kept a copy of its input, as under autocast.
_CHANGED = "called with an input that is changed in place before the backward pass"


class _Probe(torch.autograd.Function):
    """The identity in place on a layer's output; its backward passes input and gradient on.

    In place (`mark_dirty`) it survives an in-place activation behind it, and the input in
    `save_for_backward` is dropped and recomputed by checkpointing like any other.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, tap: Tap, shape: torch.Size, product: Any
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.shape, ctx.product, ctx.first_pass = tap, shape, product, None
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            ctx.tap.lose(_CHANGED)  # torch raises it by itself where the call needs the input
            return g, None, None, None, None
        seen = g if g.shape == ctx.shape else g.reshape(ctx.shape)
        # Later passes through the same call are of other terms of one loss.
        first = backward_pass() if ctx.first_pass is None else ctx.first_pass
        if torch.is_grad_enabled():  # the gradient will have parts that come from this derivative
            ctx.tap.differentiate(g)
        if ctx.tap.take(x, seen, ctx.product, first):
            ctx.first_pass = first
        return g, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        """The identity, too. What derivatives in forward mode add to the loss brings no rows."""
        ctx.tap.differentiate()
        return tangent.add_(0)  # torch wants it changed in place, as the output is


class Tap:
    """Where the rows of a layer come from: a forward hook that probes the output of a module.

    It holds its owner weakly and becomes inert when that is gone; a copied or unpickled model has
    inert taps.

    Attributes:
        source: What knows which rows these are, or None.
        due: Whether rows are wanted, for graphs of torch.compile: those with probes and those
            without are told apart by it. What is not compiled asks the owner.
    """

    def __init__(self, owner: Any, source: Any, module: nn.Module | None = None) -> None:
        """`owner.rows_wanted(source)` returns what takes the rows, or None.

        `owner.reach(weight)` is what the backward pass that runs does with a gradient.
        `module` is what it is a hook of.
        """
        self._owner: Callable[[], Any] = (lambda: None) if owner is None else weakref.ref(owner)
        self._module = None if module is None else weakref.ref(module)
        self.source = source
        self.due = False
        if owner is not None:
            self._handle = compiled.handle(self)
            if source is not None:
                compiled.tell_apart(owner, source.weight)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
        """The probed output, or None to leave it as it is.

        `others` are the arguments by name and the output. What copies hooks to another module, as
        quantization does, has them called with the output alone.
        """
        *named, output = others
        kwargs = named[0] if named else {}
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return None
        if output is x:  # the module has not used its weight
            return None
        if not torch.compiler.is_compiling() and not self._is_unseen(module):
            return None
        if _is_made_by_hooks(module, self) and self.wanted():
            output = output.clone()  # autograd may have kept it, or forbid changes in place
        return self.probed(x, output)

    def _is_unseen(self, module: nn.Module) -> bool:
        """Whether a call was one of the layer that no mode has probed."""
        owner = self._owner()
        if owner is None or self.source is None or "forward" in vars(module):
            return False
        if not self._does_as_its_own(module) or owner.weight_calls.has_probed(self.source.weight):
            return False
        return self.is_of(module._parameters.get(self.source.name))

    def _does_as_its_own(self, module: nn.Module) -> bool:
        """Whether a module is what it is a hook of, or does the same: hooks may be copied."""
        own = None if self._module is None else self._module()
        return module is own or (own is not None and methods(type(module)) == methods(type(own)))

    def is_of(self, own: Any) -> bool:
        """Whether what a module has for a weight is the layer's, or is gathered from its parts."""
        owner = self._owner()
        if owner is None or self.source is None or own is None:  # it is computed
            return False
        if own is not self.source.weight:
            owner.follow_switched()
        # else it is gathered, or another's, of functional_call
        gathered = is_in_parts(self.source.weight) and isinstance(own, nn.Parameter)
        return own is self.source.weight or gathered

    def wanted(self) -> bool:
        """Whether a call of the module now should be probed."""
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return False
        if torch.compiler.is_compiling():
            return self.due and compiled.SUPPORTED and not torch.compiler.is_exporting()
        if self._rows() is None or torch._C._is_tracing():
            return False
        return bool(self.source.weight.requires_grad)  # else a pass may go on to what is before it

    def probed(self, x: Tensor, output: Tensor, product: Any = None) -> Tensor | None:
        """The output with a probe on it, or None where no rows are wanted or can be had.

        `product` tells the rows of each matrix, where the call is not simply a layer's.
        """
        if not output.requires_grad or not self.wanted():
            return None
        if torch.compiler.is_compiling():
            axis = self.source.samples_axis(x) if is_in_parts(output) else None
            return compiled.probed(x, output, self._handle, axis)
        if isinstance(output, FakeTensor):
            return None
        if output.is_leaf or (output.is_nested and output.layout is torch.strided):
            return None  # the call returned its input, or torch lets nobody see the shape
        if _has_batched_tangent(output):  # which a probe cannot change in place
            self.differentiate()
            return None
        self._follow_arguments()
        x = x.detach() if x.requires_grad else x
        x = x.clone() if x.is_inference() else x  # torch saves none, and autocast a copy
        if _is_watched() or not self.source.is_open:  # the module may have used it already
            with _disable_current_modes():
                output = output.clone()
        base = _base(output)
        if base is output:
            return _Probe.apply(output, x, self, output.shape, product)  # type: ignore[no-untyped-call,no-any-return]
        probed = _Probe.apply(base, x, self, output.shape, product)  # type: ignore[no-untyped-call]
        return probed.view(output.shape)  # type: ignore[no-any-return]

    def _follow_arguments(self) -> None:
        """Have rows as the arguments of the module say by now, such as another stride."""
        module = None if self._module is None else self._module()
        if module is None or isinstance(module, nn.Linear):
            return
        old, now = self.source.kind, kind_of(module, self.source.name)
        if getattr(old, "average_groups", False) and now is not None:
            now = now.with_average_groups()
        if now != old and type(now) is type(old):
            self.source = dataclasses.replace(self.source, kind=now)

    @uncompiled("a hook of backward passes")
    @torch.no_grad()
    def take(self, x: Tensor, g: Tensor, product: Any = None, first: int | None = None) -> bool:
        """Hand rows to the owner, if it wants them and the backward pass is one of the loss.

        `first` is the first backward pass that brought rows of the call, None in compiled code.

        Returns:
            Whether the owner took them.
        """
        rows, owner = self._rows(), self._owner()
        if rows is None or owner is None or owner.reach(self.source.weight) is Reach.NOT:
            return False
        if _is_batched(g):  # each of many gradients is of a loss of its own
            return False
        with without_autocast([g]):
            x, g = _plain(x), _plain(g)
            if x.ndim == 0:  # one index of a table is a batch of one
                x, g = x[None], g[None]
            return rows(x, g, product, first)

    def take_some(self, x: Tensor, g: Tensor, samples: int) -> None:
        """Hand on rows of some samples of a call; other processes have its other samples."""
        from singd_torch.sharding.meter import of_call

        owner = None if self.source is None else self._owner()
        if owner is not None:
            weight, axis = owner.leaf(self.source.weight), self.source.samples_axis(x)
            mesh = (self.source.weight if weight is None else weight).device_mesh
            self.take(of_call(x, mesh, axis, samples), of_call(g, mesh, axis, samples))

    @uncompiled("a hook of backward passes")
    def differentiate(self, g: Tensor | None = None) -> None:
        """Tell the owner of a derivative of the layer, which may be differentiated again.

        A backward pass that does so meets `g`, the gradient at an output.
        """
        owner = self._owner()
        if owner is not None and self.source is not None:
            owner.differentiate(self.source)
            if g is not None and g.requires_grad:
                g.register_hook(self._meet_derivative)  # type: ignore[no-untyped-call]

    @uncompiled("a hook of backward passes")
    def _meet_derivative(self, _: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            owner.pass_of_derivatives = backward_pass()

    def lose(self, reason: str) -> None:
        """Tell the owner that the layer gives no rows, if the backward pass is one of the loss."""
        owner = None if self._rows() is None else self._owner()
        if owner is not None and owner.reach(self.source.weight) is not Reach.NOT:
            owner.lose(self.source, reason)

    def is_wanted(self) -> bool:
        """Whether the owner wants rows."""
        return self._rows() is not None

    def watch(self, source: Any) -> None:
        """Take rows of another source from now on, or of none."""
        owner = self._owner()
        if owner is not None and source is not None and source.weight is not self._weight():
            compiled.tell_apart(owner, source.weight)
        self.source = source

    def follow(self, new: Mapping[Tensor, Tensor]) -> None:
        """Watch the weight that is in the place of its own now, if there is one."""
        if self._weight() in new:
            self.watch(self.source.of(new))

    def _weight(self) -> Any:
        return None if self.source is None else self.source.weight

    def _rows(self) -> TakeRows | None:
        gone = self._module is not None and self._module() is None  # another has its hooks
        owner = None if gone or self.source is None else self._owner()
        return None if owner is None else owner.rows_wanted(self.source)

    @property
    def __name__(self) -> str:
        """A name is what `torch.jit.script` asks of a hook before it compiles it."""
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of SINGD: script a copy of the model, "
            "which has none, torch.jit.script(copy.deepcopy(model))"
        )

    def __deepcopy__(self, memo: Any) -> Tap:
        """An inert tap."""
        return Tap(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an inert tap."""
        return Tap, (None, None)


def _is_watched() -> bool:
    """Whether somebody sees all operations, who may keep an output, as selective checkpoints do."""
    return torch._C._len_torch_dispatch_stack() > 0


def _is_made_by_hooks(module: nn.Module, tap: Tap) -> bool:
    """Whether other hooks have seen the output of a module before a tap, and may have made it."""
    first = [*module._forward_hooks.values()][:1]
    return any(hook is not tap for hook in first) or bool(nn.modules.module._global_forward_hooks)


def _is_batched(g: Tensor) -> bool:
    """Whether a gradient stands for many, as `is_grads_batched` of `autograd.grad` makes it."""
    functorch: Any = torch._C._functorch
    return bool(functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g))


def _has_batched_tangent(output: Tensor) -> bool:
    """Whether an output has derivatives along many directions, as a vectorized Jacobian makes."""
    if forward_ad._current_level < 0:
        return False
    tangent = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
    return tangent is not None and _is_batched(tangent)


def _plain(x: Tensor) -> Tensor:
    """A sparse tensor as a dense one, and a nested one as all of its rows."""
    if x.is_nested:
        axes = 0 if not x.is_floating_point() else 1  # indices are rows, and have none of their own
        return torch.cat([part.flatten(0, part.ndim - 1 - axes) for part in x.unbind()])
    return x if x.layout is torch.strided else x.to_dense()


def _base(output: Tensor) -> Tensor:
    """What an output is a view of, if all of it and in the same order; else the output itself.

    The output of a linear layer on three axes is a view of two. Of an operation in place on a view
    autograd makes another one, on its base, whose backward pass fills two and copies four tensors
    of the gradient's size.
    """
    base = None if output.is_nested else output._base
    if base is None or type(base) is not Tensor or not base.requires_grad or base.is_leaf:
        return output
    same = base.numel() == output.numel() and base.dtype == output.dtype
    same = same and base.storage_offset() == output.storage_offset()
    return base if same and base.is_contiguous() and output.is_contiguous() else output


def install(owner: Any, source: Any, module: nn.Module) -> list[Tap]:
    """Tap a module until the end of the owner."""
    tap = Tap(owner, source, module)
    # Other hooks may make the output another one, as tensor parallelism has.
    handle = module.register_forward_hook(tap, with_kwargs=True, prepend=True)
    weakref.finalize(owner, handle.remove)
    return [tap]


@uncompiled("a hook of backward passes")
def backward_pass() -> int:
    """A number that is the same for all calls from one backward pass."""
    return torch._C._current_graph_task_id()


def after_pass(call: Callable[[], None]) -> None:
    """Make a call when the backward pass that runs is over, after those that were asked for."""
    torch.autograd.Variable._execution_engine.queue_callback(partial(_make, call))


@uncompiled("the end of a backward pass")
def _make(call: Callable[[], None]) -> None:
    call()
