"""What takes the rows of layers from the calls of a model, until it is gone itself."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd_torch._distributed import check_are_same, check_is_there, processes_of_call
from singd_torch.capture import attention
from singd_torch.capture.averaged import Averaged
from singd_torch.capture.beside import Beside
from singd_torch.capture.calls import Calls, Hooks
from singd_torch.capture.calls import modules as modules_that_call
from singd_torch.capture.copies import leave_hooks_behind
from singd_torch.capture.ended import leave_ended
from singd_torch.capture.handed import Homes
from singd_torch.capture.keeper import Keeper
from singd_torch.capture.now import Now
from singd_torch.capture.proof import CLIPPED, Proofs
from singd_torch.capture.queue import Call, Queue
from singd_torch.capture.tap import TakeRows, Tap, after_pass, backward_pass, install
from singd_torch.layers.due import is_due, is_refresh, may_be_due, wants_proof
from singd_torch.layers.layer import IN_THE_LOSS, Layer
from singd_torch.layers.pending import part_of
from singd_torch.layers.products import MatrixRows
from singd_torch.layers.reach import Pass, Reach, part_again
from singd_torch.layers.roster import Roster
from singd_torch.layers.rows import check_sides, is_masked, rows_of
from singd_torch.layers.source import Source
from singd_torch.sharding import is_in_parts
from singd_torch.sharding.guards import is_one_of_several


class Watcher:
    """Takes rows of the layers of a model, measures them and adds them to what is pending.

    The hooks of the model hold it weakly: they are inert, and go, when it is gone.

    Attributes:
        mask: The mask of rows, or None.
        queue: The rows that wait to be measured.
        pass_of_derivatives: The last backward pass that differentiated a gradient again.
        weight_calls: The calls that are handed a weight itself.
    """

    def __init__(self, roster: Roster, keeper: Keeper) -> None:
        self.mask: Tensor | None = None
        self.queue = Queue()
        self.pass_of_derivatives: int | None = None
        self._roster, self._keeper = roster, keeper
        self._taps = weakref.WeakKeyDictionary[nn.Module, list[Tap]]()
        self._now = Now()
        self._hooks = Hooks(self, self._now)
        self._hooked = weakref.WeakSet[nn.Module]()
        self._proofs = Proofs()
        self._beside: dict[Layer, Beside] = {}
        self._sampled: str | None = None
        self._averaged = Averaged()
        self._found: Any = None  # the processes that a call has told
        self._forgotten: set[Layer] = set()
        self._pass = -1  # the last backward pass that brought rows
        self._refused = False
        self._masks: dict[torch.Size, bool] = {}  # of this step, and whether calls took them
        self._lock = threading.RLock()
        self._calls_are_due = False
        self._homes = Homes()
        self.weight_calls = Calls(self, (), self._homes, self._now)

    def watch(self) -> None:
        """Watch the layers that there are now."""
        leave_ended()
        model, layers = self._roster.model, self._roster.layers
        self._tap(layers)
        for module in modules_that_call(model, layers):
            if module not in self._hooked:
                self._hooks.install(module, self)
                self._hooked.add(module)
        leave_hooks_behind(model)
        self._homes.learn(model, self._roster.group_of)
        self.weight_calls = Calls(self, layers, self._homes, self._now)
        self.tell()

    def _tap(self, layers: list[Layer]) -> None:
        """Tap the modules that have the inputs and outputs of layers, and no others."""
        sources = {m: one for layer in layers for m, one in layer.sources if one.by_output}
        for module, source in sources.items():
            if module is None:
                continue
            if isinstance(module, nn.MultiheadAttention):
                if module not in self._taps:
                    self._taps[module] = attention.install(self, module)
            elif module not in self._taps:
                self._taps[module] = install(self, source, module)
        for module, taps in self._taps.items():
            if isinstance(module, nn.MultiheadAttention):
                attention.follow(taps, module)
            else:
                taps[0].watch(sources.get(module))

    def follow(self) -> dict[Tensor, nn.Parameter]:
        """Watch the parameters that the groups have now, by those in whose places they are."""
        new = self._roster.follow()
        for tap in self._all_taps():
            tap.follow(new)
        self._keeper.follow(new)
        self._homes.follow(new, self._roster.model)
        self.weight_calls = Calls(self, self._roster.layers, self._homes, self._now)
        self.tell()
        return new

    def tell(self) -> None:
        """Say whether rows are wanted now, for graphs of torch.compile."""
        layers = self._roster.layers
        asked = any(map(is_refresh, self._roster.groups)) or not all(one.seen for one in layers)
        for tap in self._all_taps():
            tap.due = asked and tap.is_wanted()
        # what is frozen now may be trained when it is called
        self._calls_are_due = asked and any(
            is_due(layer) for layer in layers if layer.seen or not layer.unused
        )

    def _all_taps(self) -> Iterator[Tap]:
        for taps in self._taps.values():
            yield from taps

    # ---- what is asked by calls -----------------------------------------------------------------

    def follow_switched(self) -> None:
        """Watch the parameters that groups and model have now, if others took their places."""
        if self._roster.is_switched:
            self.follow()

    def calls_wanted(self) -> bool:
        """Whether calls that are handed a weight itself should be seen now."""
        if not self._calls_are_due or not torch.is_grad_enabled() or torch._C._is_tracing():
            return False
        self.follow_switched()  # no call of this pass may be missed
        return True

    def rows_wanted(self, source: Source) -> TakeRows | None:
        """What takes the rows of a layer in the current step, or None when it is not due.

        Until the step is taken, calls of layers that have lost their rows are probed as well: what
        is checkpointed is called again in the backward pass, and has to save as much as before.
        """
        roster = self._roster
        layer = roster.by_weight.get(source.weight)
        if layer is not None and not may_be_due(layer):
            return None
        if roster.is_switched:
            source = source.of(self.follow())
        layer = roster.by_weight.get(source.weight)
        if layer is None or not layer.kind.has_rows:
            return None
        processes = processes_of_call()
        self._averaged.call()
        if self._keeper.processes is None:  # the model may have been wrapped after it was given
            self._keeper.processes = self._found = processes
        elif processes is not None and self._found is not None:
            check_are_same(self._found, processes)
        return partial(self._take, layer, source) if may_be_due(layer) else None

    def turn(self, layer: Layer) -> None:
        """Begin anew with a stack of matrices that its first call takes for transposed ones."""
        layer.turn()
        self._keeper.begin_anew(layer)

    def differentiate(self, source: Source) -> None:
        """Know that the loss of this step contains a derivative of a layer."""
        layer = self._roster.by_weight.get(source.weight)
        if layer is not None:
            self._proofs.differentiated.add(layer)

    def lose(self, source: Source, reason: str) -> None:
        """Take no rows of a layer from now on."""
        layer = self._roster.by_weight.get(source.weight)
        if layer is not None:
            layer.lose_rows(reason)

    # ---- what is taken in backward passes -------------------------------------------------------

    def leaf(self, weight: Tensor) -> Tensor | None:
        """What autograd has in the place of a weight, None where nobody can tell."""
        return self._homes.leaf(weight)

    def reach(self, weight: Tensor) -> Reach:
        """What the backward pass that runs does with the gradient of a weight."""
        return Reach.of(self.leaf(weight))

    def _take(
        self, layer: Layer, source: Source, x: Tensor, g: Tensor, product: Any, loss: int | None
    ) -> bool:
        """Take the rows of a call, for one of the losses; passes may run in several threads."""
        with self._lock:
            return self._take_alone(layer, source, x, g, product, loss)

    def _take_alone(
        self, layer: Layer, source: Source, x: Tensor, g: Tensor, product: Any, loss: int | None
    ) -> bool:
        """Take the rows of a call, or of each matrix of a product."""
        self._averaged.take(self._sampled)
        if layer.without_rows or self._is_for_another_purpose(layer):
            return False
        layer.loss = backward_pass() if loss is None else loss
        layer.called_in = layer.group["steps"]
        rows = [MatrixRows(None, x, g)] if product is None else product(x, g, layer.most_rows(x))
        for one in rows:
            part = source.part if one.part is None else one.part
            own = source
            if product is not None:
                own = dataclasses.replace(source, part=part, kept=one.kept, samples=one.samples)
            self.take_rows(layer, own, one.x, one.g)
            if wants_proof(layer) and self._takes_rows():
                self._proofs.add(layer, own, one.x, one.g, self.leaf(layer.weight))
        return self._takes_rows()

    def _is_for_another_purpose(self, layer: Layer) -> bool:
        """Whether the gradient of the backward pass that runs is not stepped along.

        It is one of `torch.autograd.grad`, and a product with second derivatives of a loss, or
        beside one of `backward`. Where `backward` adds it to the gradient, it is of the loss.
        """
        again = self.pass_of_derivatives == backward_pass()
        beside = self._sampled is None and layer.last_pass.reach is Reach.ADDED
        return (again or beside) and self.reach(layer.weight) is Reach.RETURNED

    def end_proofs(self) -> None:
        """Take no rows of layers if rows do not tell the gradient, before a step."""
        differentiated = self._proofs.differentiated
        if self._sampled is None and not is_one_of_several():  # which change gradients
            for layer in self._proofs.clipped():
                layer.lose_rows(CLIPPED)
        for layer, why in self._proofs.failed():
            layer.lose_rows(why)
        for layer in differentiated:
            if layer.misses_rows():  # all that is in the loss is a derivative
                layer.lose_rows(IN_THE_LOSS)

    def _takes_rows(self) -> bool:
        """Whether the backward pass that runs is one whose rows count."""
        return self._sampled in (None, "inside") and not self._refused

    def take_rows(self, layer: Layer, source: Source, x: Tensor, g: Tensor) -> None:
        """Take the rows of one product, of its input and the gradient at its output."""
        self._roster.check_shapes(layer.parameters)
        sharded = self._keeper.sharded
        mask = self.mask if source.kept is None else source.kept
        if sharded is not None:
            check_is_there(sharded.group)  # lest they are sent to nobody
            x, g, mask = sharded.sums.rows(layer, source, x, g, mask)
        if self._takes_rows():
            factors = layer.meter or part_of(self._keeper.factors(layer), source.part)
            if not may_be_due(layer):  # it has factors that a script has given to the state
                return
            if self.mask is not None and source.kept is None:
                fits = mask is not None and is_masked(source, x, mask)
                self._masks[self.mask.shape] = self._masks.get(self.mask.shape, False) or fits
            layer.tell_autocast(g)
            key = (source.part, source.swapped)
            self.begin_pass(layer)
            for rows in rows_of(layer, source, x, g, mask):
                if not layer.rows_seen:
                    check_sides(layer, source, rows.A, rows.B)
                self.queue.take(Call(layer, key, rows, factors, layer.loss), lent=(x, g))
            if sharded is not None:
                sharded.sums.took(layer, self.queue.flush)

    def begin_pass(self, layer: Layer) -> None:
        """Drop the rows of earlier passes whose gradients are not stepped along."""
        backward = backward_pass()
        if backward == layer.last_pass.number:
            return
        if backward != self._pass:  # which may have no calls of a layer that an earlier one had
            self._pass = backward
            for other in self._roster.layers:
                if other is not layer and other.was_called and other.last_pass.runs_in is None:
                    self._drop_earlier(other, Reach.NOT)
        reach = self.reach(layer.weight)
        self._drop_earlier(layer, reach)
        if reach in (Reach.ADDED, Reach.UNKNOWN) and is_in_parts(layer.weight):
            reach = Reach.UNKNOWN  # the parts may have no gradient before a later pass
        layer.last_pass = Pass(backward, reach)
        after_pass(partial(layer.last_pass.end, layer.weight))
        leaf = self.leaf(layer.weight) if reach is Reach.RETURNED else None
        if leaf is not None:
            if layer in self._beside:
                self._beside[layer].end()
            self._beside[layer] = Beside(self, layer, leaf)

    def drop_returned(self, layer: Layer) -> None:
        """Drop the rows of `torch.autograd.grad`, as the pass that runs adds to the gradient."""
        with self._lock:
            self._drop_earlier(layer, Reach.ADDED)

    def _drop_earlier(self, layer: Layer, reach: Reach) -> None:
        """Drop the rows of the last pass of a layer if nobody steps along its gradient."""
        if self._sampled is None and layer.last_pass.is_dropped(layer.weight, reach):
            # `sampled_labels` takes gradients away itself
            self._forgotten.add(layer)
            self.forget_rows(layer)

    def forget_rows(self, layer: Layer) -> None:
        """Have no rows of a layer."""
        self.queue.forget(layer)
        self._proofs.forget_earlier(layer)
        layer.pending = {}
        if self._keeper.sharded is not None:
            self._keeper.sharded.sums.dropped(layer)

    def leave_joined(self) -> None:
        """Take no rows of gradients that were joined by hand, as of several tasks.

        Rows of earlier passes were forgotten, and the gradient is another than the last one's. No
        call waits to be measured.
        """
        if self._sampled is None and not is_one_of_several():  # which moves gradients
            for layer in self._forgotten:
                if layer.last_pass.is_replaced(layer.weight):
                    self._proofs.leave_out(layer)
                    layer.pending = {}

    def warn_unused_mask(self) -> None:
        """Warn of a mask that no call took, where a step had the rows of all layers."""
        unused = [shape for shape, took in self._masks.items() if not took]
        trained = (one for one in self._roster.layers if one.is_trained)
        if unused and all(may_be_due(layer) for layer in trained if layer.kind.has_rows):
            self._roster.warnings.once(
                f"the mask of rows of shape {tuple(unused[0])} left nothing out: no layer whose "
                "rows are taken has an input with these first axes; give mask_rows a mask that has "
                "the first axes of the layers' inputs, such as (batch, length), or flatten it if "
                "the model flattens them",
                about="mask",
            )

    def forget(self, *, stepped: bool = False) -> None:
        """Have no rows, and begin with the rows of the next step, or of one that was `stepped`."""
        leave_ended()
        self._masks = {}
        if stepped:
            self._forgotten = set()
        else:
            told = (one for one in self._roster.layers if one.last_pass.reach is Reach.ADDED)
            self._forgotten.update(told)
        self._sampled = None
        self._proofs.forget()
        for one in self._beside.values():
            one.end()
        self._beside = {}
        self.queue.forget()
        self._roster.forget_rows()
        if self._keeper.sharded is not None:
            self._keeper.sharded.sums.forget()
        self.tell()

    # ---- by choice ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sampled_labels(self) -> Iterator[None]:
        """Take the rows of this step from backward passes inside the block, and only from them."""
        if self._sampled is None:  # else one more micro-batch
            self.forget()
        part_again(self._roster.model)
        gradients = [(p, self._kept(p.grad)) for p in self._roster.model.parameters()]
        for p, _ in gradients:
            p.grad = None
        self._sampled = "inside"
        try:
            yield
        finally:
            self._sampled = "outside"
            for p, gradient in gradients:
                p.grad = gradient

    def _kept(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient that no pass writes to: a wrapper may average all passes in one memory."""
        if gradient is None or self._keeper.processes is None:
            return gradient
        return gradient.detach().clone()

    @contextlib.contextmanager
    def no_rows(self) -> Iterator[None]:
        """Take no rows from backward passes inside the block."""
        before, self._refused = self._refused, True
        try:
            yield
        finally:
            self._refused = before
