"""The stacks of an optimizer: which layers step together, and which of them step now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singd_core.rounding import is_rounded
from singd_core.rules import Factors
from singd_torch._groups import settings_of
from singd_torch.layers.layer import Layer
from singd_torch.layers.roster import Roster
from singd_torch.sharding import parted
from singd_torch.step.equal import parted as parted_stack
from singd_torch.step.equal import stacks
from singd_torch.step.graphs import Graphs
from singd_torch.step.rounding import Row
from singd_torch.step.stack import Stack
from singd_torch.tensors import pieces
from singd_torch.tensors.scratch import Scratch

if TYPE_CHECKING:  # it imports DTensor, for a second
    from singd_torch.sharding.sharded import Sharded


class Stacker:
    """Has the stacks of equal layers, which own what is learned.

    Attributes:
        roster: What is trained.
        state: The state of the optimizer: tensors by parameter, of factors and momenta views.
        stacks: The stacks.
        sharded: What parts the work among several processes, if parameters are in parts there.
        processes: Those that have copies of the model, if several have.
        shard: Whether the work is parted among these.
        summed: Whether their gradients are summed, or averaged.
        compile: Arguments of torch.compile, None to run things as they are.
        capturable: Whether what a step reads stays where it is, as a CUDA graph needs it.
        graphs: The graphs of whole steps, where these are compiled.
        is_shown: Whether the state shows what `sharded` has arranged.
    """

    state: dict[Any, dict[str, Any]]
    stacks: Sequence[Stack] = ()
    sharded: Sharded | None = None
    processes: torch.distributed.ProcessGroup | None = None
    shard: bool = False
    summed: bool = False
    compile: dict[str, Any] | None = None
    capturable: bool = False
    graphs: Graphs | None = None
    is_shown: bool = False

    def __init__(self, roster: Roster, state: dict[Any, dict[str, Any]]) -> None:
        self.roster, self.state = roster, state
        self._scratch = Scratch()
        self._reports = False

    def stack_up(self) -> None:
        """Let equal layers step together, as they are now."""
        # of a model in parts, what this process owns steps in a share
        by_group = self.compile is not None or self.capturable
        layers = [] if self.sharded is not None else self.roster.layers
        self._have(stacks(layers, by_group=by_group))

    def _have(self, parted: Sequence[Stack]) -> None:
        self.stacks = parted
        self.stack_of: dict[Layer, Stack] = {
            layer: stack for stack in self.stacks for layer in stack.layers
        }
        self.graphs = None
        for stack in self.stacks:
            stack.compile, stack.capturable = self.compile, self.capturable
            if self.compile is not None and self.is_recorded(stack):
                stack.compile, stack.capturable = None, True
                self.graphs = self.graphs or Graphs(self.compile, self.roster.warnings)
        self._rows: dict[Any, Row] = {}
        self._report()

    def is_recorded(self, stack: Stack) -> bool:
        """Whether whole steps are compiled in which a stack steps, and not the stack alone."""
        layer = stack.layers[0]
        s, dtypes = settings_of(layer.group), [*layer.dtypes, layer.weight.dtype]
        random = s.rounding == "stochastic" and is_rounded(s.rounding, dtypes)
        on_one = all(p.device == layer.weight.device for p in self.roster.group_of)
        return on_one and self.sharded is None and not random and not pieces.on_host(layer.weight)

    def report(self) -> None:
        """Let steps tell what they know from now on, and stacks have what the state has."""
        self._reports = True
        self._report()
        for stack in self.stacks:
            self._tie(stack)

    def _tie(self, stack: Stack) -> None:
        """Let a stack hold what the state has of its layers, if it has anything."""
        if stack.is_known(self.state) and not stack.is_tied(self.state):
            stack.tie(self.state)

    def _report(self) -> None:
        for stack in self.stacks:
            if self._reports and stack.report is None:
                stack.report = {}

    # ---- what the watcher asks for --------------------------------------------------------------

    def factors(self, layer: Layer) -> Factors:
        """The factors that measure the rows of a layer."""
        stack = self.stack_of[layer]
        if stack.factors is not None and not layer.fits(stack.factors_of(layer)):
            self.stack_up()  # the model was moved or cast
            stack = self.stack_of[layer]
        if stack.factors is None:
            stack.tie(self.state)
        return stack.factors_of(layer)

    def follow(self, new: dict[Tensor, nn.Parameter]) -> None:
        """Keep of these parameters what is kept of those in whose places they are."""
        for p, q in new.items():
            if p in self.state:
                self.state[q] = self.state.pop(p)
        self.roster.let_go(self.state)
        self.arrange()

    def begin_anew(self, layer: Layer) -> None:
        """Keep nothing of a layer."""
        for p in layer.parameters:
            self.state[p].clear()
        if self.sharded is None:
            self.stack_up()
        else:  # all processes arrange it anew in the step, when they all know
            self.sharded.turned(layer)

    def go_on_by_gradients(self, layer: Layer) -> None:
        """Have the same factors, whose averages begin with the next gradient."""
        layer.by_gradient, layer.refreshes = True, 0
        own = self.state.get(layer.weight, {})
        for name in [name for name in own if name.startswith("averages.")]:
            own[name] = torch.zeros_like(own[name])

    def arrange(self) -> None:
        """Let the layers that there are step together, in parts if the parameters are in parts."""
        roster = self.roster
        if self.sharded is None:
            given = roster.group_of, self.processes
            self.sharded = parted(*given, copies=self.shard, summed=self.summed)
        if self.sharded is not None:
            self.sharded.arrange(roster, self.compile)
            self.is_shown = False
        self.stack_up()

    # ---- what steps now -------------------------------------------------------------------------

    def ready(self) -> tuple[list[Stack], list[nn.Parameter]]:
        """The stacks that step now, and the other parameters that have a gradient."""
        layers, warnings = self.roster.layers, self.roster.warnings
        ready, left = [], []
        others = [p for p in self.roster.fallback if p.grad is not None]
        lost = [layer for layer in layers if not layer.pending and layer.is_lost()]
        for layer in lost:
            self.go_on_by_gradients(layer)
        unseen = [layer.name for layer in lost if layer.has_modules and not layer.seen]
        warnings.unseen(unseen, "gradients alone refresh the factors")
        if lost or not all(stack.fits() for stack in self.stacks):
            self.stack_up()  # or the model was moved or cast
        has_any = any(p.grad is not None for p in self.roster.group_of)
        for stack in list(self.stacks):
            live = []
            for layer in stack.layers:
                if layer.pending and None not in layer.kind.row_parts:
                    layer.pending = layer.all_pending()  # an output may have no gradient
                layer.unused = has_any and layer.weight.grad is None
                known = layer.seen or layer.pending or not layer.has_rows
                if layer.weight.grad is not None and known:
                    live.append(layer)
                    continue
                if layer.weight.grad is not None:  # a frozen weight may have a trained bias
                    if not layer.missed:  # all inputs were empty so far: it waits for others
                        continue
                    left.append(layer.name)
                others += [p for p in layer.parameters if p.grad is not None]
            if live:
                ready += self._tied(stack, live)
        warnings.unseen(left, "AdamW trains the weights")
        return ready, others

    def _tied(self, stack: Stack, live: list[Layer]) -> list[Stack]:
        """The live layers of a stack as stacks that hold what the state has."""
        parts = parted_stack(stack, live)
        if parts != [stack]:
            self._have([*(s for s in self.stacks if s is not stack), *parts])
        moving = set(live)
        ready = [part for part in parts if part.layers[0] in moving]
        for part in parts:
            if part not in ready:
                self._tie(part)
            elif not part.is_tied(self.state):
                part.tie(self.state)
        return ready
