"""The stacks of an optimizer: which layers step together, and which of them step now."""

from __future__ import annotations

from torch import nn

from singd_core.rules import Factors
from singd_torch.capture.follower import Follower
from singd_torch.layers.layer import Layer
from singd_torch.step.rounding import Rows
from singd_torch.step.stack import Stack, stacks
from singd_torch.tensors.scratch import Scratch


class Stacker(Follower):
    """An optimizer whose equal layers step together.

    Attributes:
        state: Tensors by parameter.
        param_groups: The groups of parameters and their settings.
    """

    def _watch(self, model: nn.Module) -> None:
        super()._watch(model)
        self._scratch = Scratch()
        self._reports = False

    def _stack_up(self, parted: list[Stack] | None = None) -> None:
        if parted is None:  # of a model in parts, what this process owns steps in a share
            parted = [] if self._sharded is not None else stacks(self._layers)
        self._stacks = parted
        self._stack_of: dict[Layer, Stack] = {
            layer: stack for stack in self._stacks for layer in stack.layers
        }
        for stack in self._stacks:
            stack.compile, stack.capturable = self._compile, self._capturable
        self._rows: Rows = {}
        self._report()

    def _report(self) -> None:
        for stack in self._stacks:
            if self._reports and stack.report is None:
                stack.report = {}

    def _factors(self, layer: Layer) -> Factors | None:
        if layer.meter is not None:
            return None
        if layer.factors is not None and not layer.fits():  # the model was moved or cast
            self._stack_up()
        stack = self._stack_of[layer]
        if stack.factors is None:
            stack.tie(self.state)
        assert layer.factors is not None
        return layer.factors

    def _ready(self) -> tuple[list[Stack], list[nn.Parameter]]:
        """The stacks that step now, and the other parameters that have a gradient."""
        ready, left, others = [], [], [p for p in self._fallback if p.grad is not None]
        lost = [layer for layer in self._layers if not layer.pending and layer.is_lost()]
        for layer in lost:
            layer.go_on_by_gradients()
        unseen = [layer for layer in lost if layer.has_modules and not layer.seen]
        self._warn_unseen(unseen, "gradients alone refresh the factors")
        if lost or any(one.factors is not None and not one.fits() for one in self._layers):
            self._stack_up()  # or the model was moved or cast
        for stack in list(self._stacks):
            live = []
            for layer in stack.layers:
                if layer.pending and None not in layer.kind.row_parts:
                    for key in layer.roles():
                        if key not in layer.pending:  # the output of that part has no gradient
                            layer.pending[key] = layer.no_rows(key)
                layer.unused = layer.weight.grad is None
                known = layer.seen or layer.pending or not layer.has_rows
                if layer.weight.grad is not None and known:
                    live.append(layer)
                    continue
                if layer.weight.grad is not None:  # a frozen weight may have a trained bias
                    if not layer.missed:  # all inputs were empty so far: it waits for others
                        continue
                    left.append(layer)
                others += [p for p in layer.parameters if p.grad is not None]
            if live:
                ready += self._tied(stack, live)
        self._warn_unseen(left, "AdamW trains the weights")
        return ready, others

    def _tied(self, stack: Stack, live: list[Layer]) -> list[Stack]:
        """The live layers of a stack as stacks that hold what the state has."""
        parts = stack.parted(live)
        if parts != [stack]:
            self._stack_up([*(s for s in self._stacks if s is not stack), *parts])
        moving = set(live)
        ready = [part for part in parts if part.layers[0] in moving]
        for part in parts:
            wanted = part in ready or part.layers[0].factors is not None
            if wanted and not part.is_tied(self.state):
                part.tie(self.state)
        return ready
