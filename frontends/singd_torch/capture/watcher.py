"""The layers of a model and their rows: what the optimizer knows before it takes a step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singd_core import _settings
from singd_core._settings import Settings
from singd_core._warnings import warn
from singd_core.rules import Factors
from singd_torch._distributed import processes_of_call
from singd_torch._warnings import listed
from singd_torch.capture import attention
from singd_torch.capture.calls import Calls, Hooks, Now
from singd_torch.capture.calls import modules as modules_that_call
from singd_torch.capture.changes import Makeup, check_shapes
from singd_torch.capture.copies import leave_hooks_behind
from singd_torch.capture.proof import Proofs
from singd_torch.capture.queue import Call, Queue
from singd_torch.capture.scaling import Given
from singd_torch.capture.tap import TakeRows, Tap, after_pass, backward_pass, install
from singd_torch.layers.layer import MOST_MISSED, Layer, Source
from singd_torch.layers.matrices import find_all, parameter_names
from singd_torch.layers.reach import Reach
from singd_torch.sharding import parted
from singd_torch.sharding.switched import switched

if TYPE_CHECKING:  # it imports DTensor, for a second
    from singd_torch.sharding.sharded import Sharded


# What the names of parameters have behind them that are not in the model any more.
GONE = " (replaced)"


class Watcher(torch.optim.Optimizer):
    """An optimizer that watches the layers of a model for their rows.

    Attributes:
        state: Tensors by parameter.
        param_groups: The groups of parameters and their settings.
    """

    _processes: torch.distributed.ProcessGroup | None
    _names: dict[nn.Parameter, str]
    _compile: dict[str, Any] | None
    _capturable: bool = False
    _shard: bool = False
    _summed: bool = False

    def _watch(self, model: nn.Module) -> None:
        """Begin with a model of which no layer is known yet."""
        self._model = model
        self._names = {}
        self._group_of: dict[nn.Parameter, dict[str, Any]] = {}
        self._layers: list[Layer] = []
        self._fallback: list[nn.Parameter] = []
        self._taps: dict[nn.Module, list[Tap]] = {}
        self._now = Now()
        self._hooks = Hooks(self, self._now)
        self._hooked: set[nn.Module] = set()
        self._queue = Queue()
        self._warned: set[str] = set()
        self._proofs = Proofs()
        self._shapes: dict[Tensor, torch.Size] = {}
        self._makeup: Makeup | None = None
        self._given_scale: Given | None = None
        self._mask: Tensor | None = None
        self._sampled: str | None = None
        self._is_checked = False
        self._refused = False
        self._sharded: Sharded | None = None

    def _route(self) -> None:
        """Decide which parameters form layers, keeping what is known of those that stay."""
        old = {layer.weight: layer for layer in self._layers}
        self._name()
        self._place_rates()
        self._layers = find_all(self._model, self.param_groups)
        for layer in self._layers:
            layer.name, known = self._names.get(layer.weight, layer.name), old.get(layer.weight)
            if known is not None and known.is_found_as(layer):
                layer.factors, layer.pending, layer.seen = known.factors, known.pending, known.seen
                layer.by_gradient, layer.proved_in = known.by_gradient, known.proved_in
                for module, source in known.sources:
                    if module is None:  # it was met in calls
                        layer.know(source)
            elif known is not None:  # it begins anew
                self.state[layer.weight].clear()
        self._tap()
        for module in modules_that_call(self._model, self._layers):
            if module not in self._hooked:
                self._hooks.install(module, self)
                self._hooked.add(module)
        leave_hooks_behind(self._model)
        self._stack_up()
        self._index()

    def _place_rates(self) -> None:
        """Have rates in the memory of devices, where a CUDA graph reads them as they are then."""
        for group in self.param_groups if self._capturable else ():
            rate, device = group["lr"], group["params"][0].device
            if isinstance(rate, Tensor):
                group["lr"] = rate.to(device)
            else:
                group["lr"] = torch.full((), rate, dtype=torch.float32, device=device)

    def _name(self) -> None:
        """Name the parameters, those that the model has no more by what they were."""
        now = parameter_names(self._model, self.param_groups)
        trained = (p for group in self.param_groups for p in group["params"] if p not in now)
        gone = ((p, self._names[p]) for p in trained if p in self._names)
        self._names = now | {p: name.removesuffix(GONE) + GONE for p, name in gone}

    def _tap(self) -> None:
        """Tap the modules whose inputs and outputs are those of layers, and no others."""
        sources = {m: one for layer in self._layers for m, one in layer.sources if one.by_output}
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

    def _index(self) -> None:
        """Find layers and groups by parameters."""
        self._by_weight: dict[Tensor, Layer] = {layer.weight: layer for layer in self._layers}
        before = self._group_of
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        for p in self._group_of:
            self._shapes.setdefault(p, p.shape)
        taken_out = before.keys() - self._group_of.keys()
        left_out = None if self._makeup is None else {*self._makeup.left_out, *taken_out}
        self._makeup = Makeup(self._model, self._group_of, left_out)
        owned = {p for layer in self._layers for p in layer.parameters}
        self._fallback = [p for p in self._group_of if p not in owned]
        self._share_out()
        self.weight_calls = Calls(self, self._layers, self._now)
        self._tell_taps()

    def _share_out(self) -> None:
        """Part the work among several processes, if the parameters are in parts there."""
        if self._sharded is None:
            self._sharded = parted(
                self._group_of, self._processes, copies=self._shard, summed=self._summed
            )
        if self._sharded is not None:
            given = self._layers, self._fallback, self._names, self._compile
            self._sharded.arrange(self.param_groups, *given)
            self._stack_up()

    def _is_switched(self) -> bool:
        """Whether the groups have other parameters than they had, which all are in that case."""
        groups = self.param_groups
        return any(p not in self._group_of for group in groups for p in group["params"][:1])

    def _is_regrouped(self) -> bool:
        """Whether parameters were put into lists of the groups, or taken out, by hand."""
        groups = self.param_groups
        if sum(len(group["params"]) for group in groups) != len(self._group_of):
            return True
        if not any(is_refresh(group) for group in groups):
            return False
        return any(self._group_of.get(p) is not one for one in groups for p in one["params"])

    def _follow(self) -> dict[Tensor, nn.Parameter]:
        """Train the parameters that the groups have now, by those in whose places they are.

        Modules are not asked: in a forward pass they may have others still, gathered for it.
        """
        new = switched(self.param_groups, list(self._group_of))
        for layer in self._layers:
            layer.weight = new[layer.weight]
            layer.bias = None if layer.bias is None else new[layer.bias]
            layer.sources = [(module, source.of(new)) for module, source in layer.sources]
        for taps in self._taps.values():
            for tap in taps:
                tap.follow(new)
        for p, q in new.items():
            if p in self.state:
                self.state[q] = self.state.pop(p)
        self._names = {new.get(p, p): name for p, name in self._names.items()}
        self._stack_up()
        self._index()
        return new

    def _tell_taps(self) -> None:
        """Whether rows are wanted now, for graphs of torch.compile."""
        for taps in self._taps.values():
            for tap in taps:
                tap.update()
        self._calls_are_due = any(
            is_due(layer)
            for layer in self._layers
            if layer.weight.requires_grad and (layer.seen or not layer.unused)
        )

    def calls_wanted(self) -> bool:
        """Whether calls that are handed a weight itself should be seen now."""
        return self._calls_are_due and torch.is_grad_enabled() and not torch._C._is_tracing()

    def _stack_up(self) -> None:
        """Let equal layers step together, as they are now."""
        raise NotImplementedError

    def _factors(self, layer: Layer) -> Factors | None:
        """The factors of a layer that rows are measured with, None if they are elsewhere."""
        raise NotImplementedError

    def rows_wanted(self, source: Source) -> TakeRows | None:
        """What takes the rows of a layer in the current step, or None when it is not due."""
        layer = self._by_weight.get(source.weight)
        if layer is not None and not is_due(layer):
            return None
        if self._is_switched():
            source = source.of(self._follow())
        layer = self._by_weight.get(source.weight)
        if layer is None or layer.without_rows or not layer.kind.has_rows:
            return None
        if not layer.weight.requires_grad:
            return None
        if self._processes is None:  # the model may have been wrapped after it was given here
            self._processes = processes_of_call()
        return partial(self._take, layer, source) if is_due(layer) else None

    def turn(self, layer: Layer) -> None:
        """Begin anew with a stack of matrices that its first call takes for transposed ones."""
        layer.turn()
        self.state[layer.weight].clear()
        if self._sharded is None:
            self._stack_up()
        else:  # all processes arrange it anew in the step, when they all know
            self._sharded.turned(layer)

    def _take(
        self, layer: Layer, source: Source, x: Tensor, g: Tensor, product: Any, loss: int | None
    ) -> bool:
        """Take the rows of a call, of a product those of each matrix, for one of the losses."""
        layer.loss = backward_pass() if loss is None else loss
        layer.called_in = layer.group["steps"]
        rows = [(None, x, g, None)] if product is None else product(x, g, layer.most_rows(x))
        for part, own_x, own_g, kept in rows:
            part = source.part if part is None else part
            own = source if product is None else dataclasses.replace(source, part=part, kept=kept)
            if layer.wants_proof() and self._takes_rows():
                self._proofs.add(layer, own, own_x, own_g)
            self._take_rows(layer, own, own_x, own_g)
        return self._takes_rows()

    def differentiate(self, source: Source) -> None:
        """Ask for no proof of a layer whose gradient has parts that its rows do not tell."""
        layer = self._by_weight.get(source.weight)
        if layer is not None:
            self._proofs.leave_out(layer)

    def _end_proofs(self) -> None:
        """Take no rows of layers that are used where no call is seen, before a step."""
        for layer in self._proofs.failed():
            layer.lose_rows("used where no call is seen, or in the loss by itself")

    def _takes_rows(self) -> bool:
        """Whether the backward pass that runs is one whose rows count."""
        return self._sampled in (None, "inside") and not self._refused

    def _take_rows(self, layer: Layer, source: Source, x: Tensor, g: Tensor) -> None:
        check_shapes(layer.parameters, self._shapes, self._names)
        if self._sharded is not None:
            x, g = self._sharded.sums.rows(layer, x, g)
        if self._takes_rows():
            self._factors(layer)
            layer.tell_autocast(g)
            factors, key = layer.factors_of(source.part), (source.part, source.swapped)
            backward = backward_pass()
            if backward != layer.last_pass[0]:
                self._begin_pass(layer, backward)
            for rows in layer.rows(source, x, g, self._mask):
                self._queue.take(Call(layer, key, rows, factors, layer.loss), lent=(x, g))
            if self._sharded is not None:
                self._sharded.sums.took(layer, self._queue.flush)

    def _begin_pass(self, layer: Layer, backward: int) -> None:
        """Drop the rows of an earlier pass whose gradient is gone, as by `model.zero_grad()`."""
        gone = layer.last_pass[1] is Reach.ADDED and layer.weight.grad is None
        if gone and self._sampled is None:  # `sampled_labels` takes gradients away itself
            self._queue.forget(layer)
            layer.pending = {}
            if self._sharded is not None:
                self._sharded.sums.dropped(layer)
        layer.last_pass = backward, Reach.of(layer.weight)
        if layer.last_pass[1] is Reach.UNKNOWN:
            after_pass(partial(self._end_pass, layer))

    def _end_pass(self, layer: Layer) -> None:
        """Find out whether a weight in parts has a gradient: `fully_shard` may gather it first."""
        if layer.weight.grad is not None:
            layer.last_pass = layer.last_pass[0], Reach.ADDED

    @contextlib.contextmanager
    def sampled_labels(self) -> Iterator[None]:
        """Take the rows of this step from backward passes inside the block, and only from them.

        With the loss of labels sampled from the model's own predictions inside, the factors are
        those of the Fisher matrix and not of the empirical one. Gradients come from outside alone:

            with optimizer.sampled_labels():
                F.cross_entropy(logits, sample(logits)).backward(retain_graph=True)
        """
        if self._sampled is None:  # else one more micro-batch
            self._forget_rows()
        gradients = [(p, p.grad) for p in self._model.parameters()]
        for p, _ in gradients:
            p.grad = None
        self._sampled = "inside"
        try:
            yield
        finally:
            self._sampled = "outside"
            for p, gradient in gradients:
                p.grad = gradient

    @contextlib.contextmanager
    def no_rows(self) -> Iterator[None]:
        """Take no rows from backward passes inside the block.

        For passes with respect to the weights whose gradients are not those of the training loss:
        Hessian-vector products, norms of the gradients of single tasks, sharpness. (Passes that
        reach no weight, such as derivatives with respect to inputs, bring no rows anyway.)

            with optimizer.no_rows():
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        """
        before, self._refused = self._refused, True
        try:
            yield
        finally:
            self._refused = before

    def mask_rows(self, mask: Tensor | None) -> None:
        """Leave rows out of the factors until the next step, such as those of padding.

        Args:
            mask: Boolean, shape (batch, ...), False at positions that are left out. It concerns the
                layers whose input has these first axes, and only their factors: the loss has to
                leave the positions out by itself. None for no mask.

        Raises:
            TypeError: If the mask is not boolean.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask_rows wants a boolean mask, not {mask.dtype}: give mask.bool()")
        self._mask = mask

    def _forget_rows(self) -> None:
        self._sampled = None
        self._proofs.forget()
        self._queue.forget()
        for layer in self._layers:
            layer.pending, layer.last_pass = {}, (-1, Reach.NOT)
        if self._sharded is not None:
            self._sharded.sums.forget()
        self._tell_taps()

    def _part_with_rows(self) -> None:
        """Train layers without rows from now on, whose rows would not tell the gradient.

        That is kept in their groups, and so in checkpoints.
        """
        lost = [layer for layer in self._layers if layer.without_rows]
        for layer in lost:
            params = layer.group["params"]
            index = next(i for i, p in enumerate(params) if p is layer.weight)
            layer.group.setdefault("without_rows", {})[index] = layer.without_rows
        if lost:
            expected = [layer for layer in lost if layer.has_modules or layer.was_called]
            if expected:
                first = expected[0]
                self._warn_once(
                    f"no rows of {first.name!r} are taken, since it is {first.without_rows}: it is "
                    "trained without; print(optimizer) shows all that is, and why"
                )
            self._route()

    def _warn_unseen(self, layers: Sequence[Layer], what: str) -> None:
        """Warn once of each layer, in one warning of all that are new."""
        names = [one.name for one in layers if f"no rows of {one.name}" not in self._warned]
        if names:
            self._warned.update(f"no rows of {name}" for name in names)
            warn(
                f"no rows of {listed(names)} have been seen: backward ran before this optimizer "
                "was built, or inputs were empty, or weights were used without calls of their "
                "modules, or in a graph that was compiled before the optimizer was built (then "
                "call torch.compiler.reset()) or by torch before 2.13. Until rows are seen, "
                f"{what}"
            )

    def _warn_missed(self) -> None:
        """Warn of layers whose rows came before, when they have been missing for long enough."""
        missed = [layer for layer in self._layers if layer.missed == MOST_MISSED]
        layers = [layer for layer in missed if layer.rows_seen]
        if layers:
            goes_on = all(layer.is_lost() for layer in layers)
            what = "gradients alone refresh the factors" if goes_on else "the factors stay"
            names = [layer.name for layer in layers]
            self._warn_once(
                f"no rows of {listed(names)} have come for {MOST_MISSED} refreshes in a row, and "
                "gradients have: the weights are used without calls of their modules by now, as "
                f"in compiled functions. Until rows come again, {what}",
                about=f"missed {names}",
            )

    def _warn_once(self, text: str, about: str = "") -> None:
        """Warn, unless that was done with this text or `about` the same."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            warn(text)

    def _go_on_from(self, factors: Mapping[nn.Parameter, Factors | None]) -> None:
        for layer in self._layers:
            layer.pending, layer.factors = {}, factors[layer.weight]
            layer.seen = layer.factors is not None  # they are made when rows are first seen
            learned = layer.factors is None or layer.factors.has_rows
            layer.by_gradient = layer.kind.has_rows and not learned
        self._tell_taps()


def is_due(layer: Layer) -> bool:
    """Whether rows of a layer are wanted in the current step."""
    return not layer.without_rows and may_be_due(layer)


def may_be_due(layer: Layer) -> bool:
    """Whether a step wants rows of a layer, unless this process has lost them by now."""
    return not layer.seen or is_refresh(layer.group)


def is_refresh(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the factors that there are."""
    return _is_due(group["steps"], group["T"], group["growing_T"])


@lru_cache(maxsize=16)
def _is_due(steps: int, T: int, growing_T: bool) -> bool:
    """Of all layers alike, each of which is asked several times in a step."""
    return bool(_settings.is_due(steps, Settings(T=T, growing_T=growing_T)))
