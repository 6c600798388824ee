"""Getting the rows of a layer from the calls of its modules, without changing the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# Takes the input of a call and the gradient of the loss at its output.
Rows: TypeAlias = Callable[[Tensor, Tensor], None]


class _Probe(torch.autograd.Function):
    """The identity in place on a layer's output; its backward passes input and gradient on.

    In place (`mark_dirty`) it survives an in-place activation behind it, and the input in
    `save_for_backward` is dropped and recomputed by checkpointing like any other.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rows = rows
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,), (g,) = ctx.saved_tensors, grads
        with torch.no_grad():
            ctx.rows(x, g)
        return g, None, None


def probed(
    owner: Any,
    source: Any,
    x: Tensor,
    output: Tensor,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """The output with a probe on it, or None where no rows are wanted or can be had.

    `arrange` brings input and output gradient into the layout that the rows are taken from.
    """
    if not (torch.is_grad_enabled() and output.requires_grad) or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    rows = owner.rows_wanted(source)
    if rows is None:
        return None
    if arrange is not None:
        take = rows
        rows = lambda x, g: take(arrange(x), arrange(g))  # noqa: E731
    return _Probe.apply(output, x.detach(), rows)  # type: ignore[no-untyped-call,no-any-return]


class Hook:
    """A forward hook that probes the output where its owner wants the rows.

    It holds its owner weakly and becomes inert when that is gone; a copied or unpickled model has
    inert hooks.
    """

    def __init__(self, owner: Any, source: Any) -> None:
        """`owner.rows_wanted(source)` returns what takes the rows, or None."""
        self._owner = None if owner is None else weakref.ref(owner)
        self._source = source

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The probed output, or None to leave it as it is."""
        owner = None if self._owner is None else self._owner()
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if owner is None or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return None
        return probed(owner, self._source, x, output)

    def __deepcopy__(self, memo: Any) -> Hook:
        """An inert hook."""
        return Hook(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an inert hook."""
        return Hook, (None, None)


def install(owner: Any, source: Any, module: nn.Module) -> None:
    """Hook a module until the end of the owner."""
    handle = module.register_forward_hook(Hook(owner, source), with_kwargs=True)
    weakref.finalize(owner, handle.remove)


def backward_pass() -> int:
    """A number that is the same for all calls from one backward pass."""
    return torch._C._current_graph_task_id()
