"""One step of the weights of an optimizer, of layers and of all others, or of none of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import ranged
from singd_core.step import warmed
from singd_torch import _bundle_step, _fallback, _finite, _scratch
from singd_torch._bundle import Bundle, bundled
from singd_torch._groups import settings_of
from singd_torch._scaling import Scales
from singd_torch._stacks import Stack
from singd_torch._step import Gradients, advance
from singd_torch._watcher import Watcher


class Stepper(Watcher):
    """An optimizer that takes steps, and counts those that it does not take.

    Attributes:
        state: Tensors by parameter.
        param_groups: The groups of parameters and their settings.
    """

    _skipped: Tensor | int = 0
    _bundles: Sequence[Bundle] = ()

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
        norms = _finite.norms({p: raw(p) for p in moving}, scales.grads)
        sizes = [x for layer in layers for x in layer.sizes()]
        size = self._of_all(_finite.total([*norms.values(), *sizes]))
        ok = skip = None
        if not isinstance(size, Tensor):  # then nothing is masked
            if not math.isfinite(size):
                self._skipped += 1
                self._warn_skipped()
                return
        else:
            ok = size < math.inf
            skip = (~ok).to(torch.float32)

        given = Gradients(of, raw, norms, lambda p: chosen[id(self._group_of[p])], scales, ok)
        with _scratch.lent(self._scratch):
            moved = self._advance(ready, given)
        grads = [of(p) for p in others]
        _fallback.step_all(self._group_of, others, grads, self.state, skip, shares)
        if ok is None and not all(moved):
            self._skipped += 1
            self._warn_skipped()
        elif ok is not None:
            failed = ~torch.stack([ok, *(m.to(ok.device) for m in moved)]).all()
            self._skipped = self._skipped + failed.to(torch.float32)

    def _advance(self, ready: list[Stack], given: Gradients) -> list[Any]:
        """Change what belongs to layers, and return what moved."""
        together = [stack for stack in ready if _bundle_step.steps_so(stack, given)]
        now, waiting = bundled(together, self._bundles, self._stacks)
        self._bundles = now + waiting
        moved = [_bundle_step.advance(bundle, self.state, given) for bundle in now]
        others = [stack for stack in ready if stack not in set(together)]
        return moved + [advance(stack, self.state, given) for stack in others]

    def _of_all(self, size: Any) -> Any:
        """The sum over all that step together of what is finite if their gradients and rows are."""
        return size

    @property
    def skipped(self) -> int:
        """How many steps changed nothing, as a gradient or row was not finite (a host sync)."""
        count = int(self._skipped)
        if count:
            self._warn_skipped()
        return count

    def _warn_skipped(self) -> None:
        self._warn_once(
            "a gradient or a layer's row was NaN or infinite: the step changed nothing. "
            "`optimizer.skipped` counts such steps"
        )


def _unscaled(scale: Any, p: nn.Parameter) -> Tensor:
    """The gradient of a parameter, zeros where a layer's weight or bias has none."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if scale is None else ranged(p.grad) / scale
