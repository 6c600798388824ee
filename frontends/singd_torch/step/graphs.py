"""Steps of an accelerator as compiled graphs: the second step of a kind is recorded as it is taken.

What such steps read and write stays where it is (`Stack.capturable`), but for their inputs: the
gradients, the rates, the count of skipped steps, the sums over rows, and the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from singd_core._settings import gap, is_due, rate_of_factors
from singd_torch._groups import settings_of
from singd_torch._warnings import Warnings
from singd_torch.capture.scaling import Scales
from singd_torch.step.stack import Stack

# Of so many kinds of steps at most: between refreshes, before one, at one, and of other parameters.
_MOST = 16

Change = Callable[[], list[Tensor] | None]

# Small kernels that do not depend on each other become one, with any number of tensors: a step
# has several for each parameter.
_TOGETHER = {
    "combo_kernels": True,
    "combo_kernel_max_num_nodes": 256,
    "combo_kernel_max_num_args": 2048,
}


class Kind(NamedTuple):
    """What a step has in common with others.

    Attributes:
        key: Equal for steps that differ in the numbers of their inputs alone.
        inputs: The tensors that are others in each step.
    """

    key: Hashable
    inputs: list[Tensor]


class Graph(NamedTuple):
    """What takes the steps of a kind.

    Attributes:
        run: Takes the inputs, and returns what the step returns.
        kept: What the key names, which has to live as long.
        made: What preconditions each stack after such a step.
    """

    run: Callable[..., list[Tensor]]
    kept: list[Any]
    made: list[Any]


class Graphs:
    """The graphs of an optimizer's steps, by kind.

    Attributes:
        arguments: Arguments of torch.compile.
        warnings: Tells of steps that are of too many kinds.
    """

    def __init__(self, arguments: Mapping[str, Any], warnings: Warnings) -> None:
        self.arguments, self.warnings = arguments, warnings
        self._known: dict[Hashable, Graph | None] = {}

    def take(self, kind: Kind, stacks: Sequence[Stack], change: Change) -> list[Tensor] | None:
        """Take one step: by a graph, or by `change`, which returns the same."""
        if kind.key not in self._known:  # it makes the memory that others of its kind have
            if len(self._known) < _MOST:
                self._known[kind.key] = None
            else:
                self.warnings.once(
                    f"compile_step: steps are of more than {_MOST} kinds, and further ones run "
                    "uncompiled: batches have many sizes, or a schedule changes another setting "
                    "than lr, such as momentum, which can be a tensor that it changes in place"
                )
            return change()
        graph = self._known[kind.key]
        if graph is None:
            return self._recorded(kind, stacks, change)
        found = graph.run(*kind.inputs)
        for stack, made in zip(stacks, graph.made, strict=True):
            stack.preconditioner = made
            for layer in stack.layers:
                layer.pending = {}
        return found

    def _recorded(self, kind: Kind, stacks: Sequence[Stack], change: Change) -> list[Tensor]:
        from torch.fx.experimental.proxy_tensor import make_fx  # with what takes a second to import

        kept, found = [_state_of(stack) for stack in stacks], []

        def taken(*inputs: Tensor) -> list[Tensor]:
            found.extend(change() or [])
            return found

        traced = _without_out(make_fx(taken)(*kind.inputs))
        run = torch.compile(traced, **_arguments(self.arguments))
        made = [stack.preconditioner for stack in stacks]
        self._known[kind.key] = Graph(run, kept, made)
        return found


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of torch.compile, with `_TOGETHER` where no options, mode or compiler are given."""
    found = {"fullgraph": True, "dynamic": False} | dict(given)
    if found.keys().isdisjoint({"options", "mode", "backend"}):
        from torch import _inductor  # takes a second to import

        known = _inductor.list_options()
        found["options"] = {name: x for name, x in _TOGETHER.items() if name in known}
    return found


def kind_of(
    stacks: Sequence[Stack],
    parameters: Sequence[nn.Parameter],
    groups: Sequence[dict[str, Any]],
    rates: Sequence[Tensor],
    scales: Scales,
    matrices: int,
) -> Kind | None:
    """The kind of a step of stacks, by the gradients of these parameters; None if it has none.

    The model has so many `matrices` that are trained.
    """
    if not all(stack.capturable and stack.report is None for stack in stacks):
        return None
    of_groups = [_of_group(group) for group in groups]
    if None in of_groups:
        return None
    gradients = [p.grad for p in parameters]
    inputs = [*rates, *(g for g in gradients if g is not None)]
    numbers: list[Any] = [matrices, *(g is None for g in gradients)]
    sums: list[Any] = [scales.grads, scales.rows, scales.found_inf]
    for layer in (layer for stack in stacks for layer in stack.layers):
        for key, pending in sorted(layer.pending.items(), key=str):
            sums += [*tree_leaves((pending.inputs, pending.outputs)), pending.N]
            sums += [pending.M, pending.M_now]
            numbers.append(key)
        numbers.append(len(layer.pending))
    inputs += [x for x in sums if isinstance(x, Tensor)]
    numbers += [x for x in sums if not isinstance(x, Tensor)]
    shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
    known = tuple(map(id, (x for stack in stacks for x in (stack, *_state_of(stack)))))
    return Kind((known, *of_groups, shapes, tuple(map(id, parameters)), *numbers), inputs)


def _state_of(stack: Stack) -> tuple[Any, ...]:
    return stack.factors, stack.momenta, stack.late, stack.preconditioner


def _of_group(group: dict[str, Any]) -> Hashable:
    """What a step has of the settings of a group, None while gaps between refreshes grow."""
    first, s = group["steps"], settings_of(group)
    due = [step for step in (first, first + 1) if is_due(step, s)]
    if any(gap(step, s) != s.T for step in due):
        return None
    values = [value for name, value in vars(s).items() if name != "lr"]
    rates = [rate_of_factors(step, s) for step in due]
    known = [id(value) if isinstance(value, Tensor) else value for value in (*rates, *values)]
    return (*(step - first for step in due), *known)


def _without_out(traced: fx.GraphModule) -> fx.GraphModule:
    """The same with copies in the place of `out=`, for which torch.compile has few rules."""
    for node in [n for n in traced.graph.nodes if "out" in n.kwargs]:
        given = {name: value for name, value in node.kwargs.items() if name != "out"}
        with traced.graph.inserting_before(node):
            made = traced.graph.call_function(node.target.overloadpacket, node.args, given)
            copied = traced.graph.call_function(
                torch.ops.aten.copy_.default, (node.kwargs["out"], made)
            )
        node.replace_all_uses_with(copied)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced
