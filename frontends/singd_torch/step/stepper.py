"""One step of the weights of an optimizer, of layers and of all others, or of none of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from singd_core import _settings
from singd_core._array import ranged
from singd_core.rounding import Place
from singd_core.step import warmed
from singd_torch import _fallback, _state
from singd_torch._distributed import agree_on_rows, reduce_rows
from singd_torch._groups import settings_of
from singd_torch._warnings import listed
from singd_torch.capture import scaling
from singd_torch.capture.changes import check_shapes
from singd_torch.capture.scaling import Given, Scales
from singd_torch.capture.watcher import is_due, may_be_due
from singd_torch.layers.layer import Layer
from singd_torch.sharding.guards import ALONE, is_one_of_several, refuse_stages
from singd_torch.step import bundle_step, rounding
from singd_torch.step.bundle import Bundle, bundled
from singd_torch.step.stack import Stack
from singd_torch.step.stack_step import Gradients, advance
from singd_torch.step.stacker import Stacker
from singd_torch.tensors import finite, scratch


class Stepper(Stacker):
    """An optimizer that takes steps, and counts those that it does not take.

    Attributes:
        state: Tensors by parameter.
        param_groups: The groups of parameters and their settings.
    """

    _skipped: Tensor | int = 0
    _bundles: Sequence[Bundle] = ()
    _places: Mapping[nn.Parameter, Place] = MappingProxyType({})  # of those that are parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. If a gradient or row is not finite, it changes nothing and is counted.

        Args:
            closure: Evaluates the model, calls `backward` and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_switched():
            self._follow()
        elif self._is_regrouped():
            self._renew()
        if not self._is_checked:
            refuse_stages(self._group_of)
            self._is_checked = True
        check_shapes(self._group_of, self._shapes, self._names)
        for p in self._group_of:
            if p.grad is not None and p.grad.is_sparse:
                name = self._names.get(p, "a parameter")
                raise RuntimeError(
                    f"the gradient of {name!r} is sparse, which SINGD does not take: "
                    "give its module sparse=False, or an optimizer of its own"
                )
        self._queue.flush()
        if not self.state and self._is_no_step():
            self._begin()
            return loss
        if self._sharded is None:  # else modules may have what was gathered for them
            self._follow_model()
        self._end_proofs()
        self._agree_on_rows()
        self._warn_missed()
        self._part_with_rows()
        scales = scaling.scales(self, self._given_scale)
        if self._sharded is not None:
            self._skipped = self._sharded.step(scales)
            if not self.state:
                self._sharded.show(self.state)
        else:
            self._step_whole(scales)
        for group in self.param_groups:
            group["steps"] += 1
        self._forget_rows()
        self._mask = self._given_scale = None
        return loss

    @property
    def replayable(self) -> bool:
        """Whether a CUDA graph of an earlier step may take the place of the next one.

        It may where the next step has neither to refresh factors nor to measure for that, nor warms
        up: then nothing in it depends on the number of steps. Never without `capturable=True`.
        """
        if not self._capturable or self._sharded is not None:
            return False
        for group in self.param_groups:
            steps, s = group["steps"], settings_of(group)
            if steps < s.warmup or _settings.is_due(steps, s) or _settings.is_due(steps + 1, s):
                return False
        return not any(is_due(layer) for layer in self._layers if layer.weight.requires_grad)

    def replayed(self) -> None:
        """Count a step that a CUDA graph has taken, in place of `step`.

        Raises:
            RuntimeError: If it had to be one that is not `replayable`.
        """
        if not self.replayable:
            raise RuntimeError(
                "this step was to refresh the factors, to measure for that or to warm up: take it "
                "with step(), and replay a graph only where optimizer.replayable"
            )
        for group in self.param_groups:
            group["steps"] += 1
        self._forget_rows()

    def _agree_on_rows(self) -> None:
        """Have the same rows on all processes as others have them."""
        group = self._processes if self._sharded is None else self._sharded.group
        if group is not None and group.size() > 1:
            trained = [one for one in self._layers if one.weight.requires_grad]
            asked = [one for one in trained if one.kind.has_rows and may_be_due(one)]
            if not asked:
                return
            if self._sharded is not None:
                self._sharded.agree(asked)
                if not self._sharded.is_arranged():  # one has seen how a stack is used
                    self._share_out()
            else:
                kinds = [one.kind for one in asked]
                agree_on_rows(asked, group)
                if [one.kind for one in asked] != kinds:  # another has seen how a stack is used
                    self._stack_up()
        else:
            for layer in self._layers:
                if layer.weight.requires_grad and layer.kind.has_rows and may_be_due(layer):
                    layer.count_missed(called=layer.was_called, missed=layer.misses_rows())

    def _step_whole(self, scales: Scales) -> None:
        """Step parameters that are here as a whole, with the rows of all processes."""
        if self._processes is not None:
            due = [one for one in self._layers if one.weight.requires_grad and is_due(one)]
            for layer in due:
                self._factors(layer)
            reduce_rows(due, self._processes, summed=self._summed)
        elif is_one_of_several() and any(layer.pending for layer in self._layers):
            self._warn_once(ALONE)
        ready, others = self._ready()
        if ready or others:
            self._take_step(ready, others, scales)
        else:
            self._check_parameters()

    def _begin(self) -> None:
        """Have the state that the first steps would make."""
        if self._sharded is not None:
            self._sharded.begin()
            self._sharded.show(self.state)
        else:
            others = {p: self._group_of[p] for p in self._fallback}
            self.state.update(_state.before_any_step(self._layers, others))

    def _is_no_step(self) -> bool:
        """Whether this is how torch.distributed.checkpoint makes the state that it loads into."""
        rates_are_zero = all(float(group["lr"]) == 0.0 for group in self.param_groups)
        return rates_are_zero and not any(layer.pending for layer in self._layers)

    def set_current_grad_scale(self, scale: Any, *, unscaled: bool = False) -> None:
        """Tell what the loss of the next step was multiplied by: it is divided out again.

        torch.amp.GradScaler is asked by itself.

        Args:
            scale: The scale, a number or 0-d.
            unscaled: Whether the gradients have been divided by it already, as for clipping.
        """
        self._given_scale = Given(scale, unscaled)

    def _take_step(self, ready: list[Stack], others: list[nn.Parameter], scales: Scales) -> None:
        shares = {id(g): warmed(settings_of(g), g["steps"]) for g in self.param_groups}
        chosen = {
            id(g): dataclasses.replace(settings_of(g), lr=g["lr"] * shares[id(g)])
            for g in self.param_groups
        }
        layers = [layer for stack in ready for layer in stack.layers]
        moving = [p for layer in layers for p in layer.parameters if p.grad is not None]
        moving += others
        of = partial(_unscaled, scales.grads)
        raw = partial(_unscaled, None)
        norms, rows = finite.norms({p: raw(p) for p in moving}, scales.grads)
        sizes = [x for layer in layers for x in layer.sizes()]
        size = self._of_all(finite.total([*rows, *sizes]))
        ok = bad = skip = None
        if not isinstance(size, Tensor):  # then nothing is masked
            if not math.isfinite(size):
                self._skip(self._not_finite(norms, layers))
                return
        else:
            ok = size < math.inf
            bad = ~ok
            skip = bad.to(torch.float32)

        given = Gradients(of, raw, norms, lambda p: chosen[id(self._group_of[p])], scales, ok, bad)
        with scratch.lent(self._scratch):
            moved = self._advance(ready, given)
        grads = [of(p) for p in others]
        known: dict[str, Any] = {"names": self._names, "places": self._places, "rows": self._rows}
        store = partial(rounding.store, **known, state=self.state, skip=skip)
        _fallback.step_all(self._group_of, others, grads, self.state, skip, shares, store)
        if ok is None and not all(moved):
            still = [stack for stack, m in zip(ready, moved, strict=True) if not m]
            names = [layer.name for stack in still for layer in stack.layers]
            self._skip({"natural gradient": names})
        elif ok is not None:
            all_moved = [m.to(ok.device) for m in moved] or [ok]  # only if ok
            found = torch.stack(all_moved).all() if len(all_moved) > 1 else all_moved[0]
            if not isinstance(self._skipped, Tensor):
                self._skipped = torch.full((), self._skipped, dtype=torch.float32, device=ok.device)
            self._skipped.add_(~found)

    def _advance(self, ready: list[Stack], given: Gradients) -> list[Any]:
        """Change what belongs to layers, and return what moved."""
        together: dict[Stack, None] = {}
        if given.ok is not None:
            so = (stack for stack in ready if bundle_step.steps_so(stack, given))
            together = dict.fromkeys(so)
            now, waiting = bundled(list(together), self._bundles, self._stacks)
            self._bundles = now + waiting
            moved = [bundle_step.advance(bundle, self.state, given) for bundle in now]
        else:
            moved = []
        others = [stack for stack in ready if stack not in together]
        return moved + [advance(stack, self.state, given) for stack in others]

    def _of_all(self, size: Any) -> Any:
        """The sum over all that step together of what is finite if their gradients and rows are."""
        return size

    @property
    def skipped(self) -> int:
        """How many steps changed nothing, as a gradient or row was not finite (a host sync)."""
        count = int(self._skipped)
        if count:  # on an accelerator the step did not wait to know which it was
            there = {p: p.grad for p in self._group_of if type(p.grad) is Tensor}
            self._warn_skipped(self._not_finite(finite.norms(there)[0], []))
        return count

    def _skip(self, what: Mapping[str, Sequence[str]]) -> None:
        self._skipped += 1
        self._warn_skipped(what)

    def _not_finite(
        self, norms: Mapping[nn.Parameter, Any], layers: Sequence[Layer]
    ) -> dict[str, list[str]]:
        """What of gradients and rows is not finite, of which the host may have to wait to know."""
        return {
            "gradient": [
                self._names.get(p, "a parameter")
                for p, norm in norms.items()
                if not math.isfinite(norm)
            ],
            "curvature": [
                layer.name
                for layer in layers
                if not all(bool(x.isfinite().all()) for x in layer.sizes())
            ],
        }

    def _warn_skipped(self, what: Mapping[str, Sequence[str]]) -> None:
        kind, names = next(((k, n) for k, n in what.items() if n), ("", ()))  # causes come first
        if len(names) > 1:
            text = f"the {kind}s of {listed(names)} were"
        else:
            text = f"the {kind} of {names[0]!r} was" if names else "a gradient or row was"
        self._warn_once(
            f"{text} NaN or infinite: the step changed nothing. "
            "`optimizer.skipped` counts such steps",
            about="skipped",
        )


def _unscaled(scale: Any, p: nn.Parameter) -> Tensor:
    """The gradient of a parameter, zeros where a layer's weight or bias has none."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if scale is None else ranged(p.grad) / scale
