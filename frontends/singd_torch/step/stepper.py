"""One step of the weights of an optimizer, of layers and of all others, or of none of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd_core._array import ranged
from singd_core._settings import StepSettings, arrays_of
from singd_core.rounding import Place
from singd_torch import _fallback, _state
from singd_torch._distributed import (
    agree_on_rows,
    is_any,
    of_same,
    processes_around,
    reduce_rows,
)
from singd_torch._groups import settings_of_step
from singd_torch._warnings import listed
from singd_torch.capture.scaling import Scales
from singd_torch.layers.due import is_due, may_be_due
from singd_torch.layers.layer import Layer
from singd_torch.layers.reach import is_zero
from singd_torch.layers.roster import matrices_of
from singd_torch.sharding.guards import ALONE, APART, is_one_of_several
from singd_torch.step import bundle_step, rounding
from singd_torch.step.begun import Gradients, on_device
from singd_torch.step.bundle import Bundle, bundled
from singd_torch.step.graphs import kind_of
from singd_torch.step.stack import Stack
from singd_torch.step.stack_step import advance
from singd_torch.step.stacker import Stacker
from singd_torch.tensors import finite, scratch

# What the warning of steps that changed nothing is about.
_SKIPPED = "skipped"


class Stepper(Stacker):
    """Takes steps, and counts those that it does not take.

    Attributes:
        skipped: How many steps changed nothing.
        places: Where parameters stand that are parts of others.
        is_alike: Whether other processes with copies are known to train the same parameters.
        has_looked: Whether a wrapper was looked for that no call has told.
    """

    skipped: Tensor | int = 0
    bundles: Sequence[Bundle] = ()
    is_alike: bool = False
    has_looked: bool = False
    places: Mapping[nn.Parameter, Place] = MappingProxyType({})

    @property
    def is_no_step(self) -> bool:
        """Whether this is how torch.distributed.checkpoint makes the state that it loads into.

        All rates and gradients are zero then. If processes have parts, all of them call this.
        """
        if any(float(group["lr"]) != 0.0 for group in self.roster.groups):
            return False
        found = any(layer.pending for layer in self.roster.layers)
        grads = (p.grad for p in self.roster.group_of if p.grad is not None)
        found = found or not all(map(is_zero, grads))
        if self.sharded is not None:
            found = is_any(found, self.sharded.group, next(iter(self.roster.group_of)).device)
        return not found

    def begin(self) -> None:
        """Have the state that the first steps would make."""
        if self.sharded is not None:
            self.sharded.begin()
            self.sharded.show(self.state)
        else:
            roster = self.roster
            self.state.update(_state.before_any_step(roster.layers, roster.fallback))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that step together, if there are several."""
        return self.processes if self.sharded is None else self.sharded.group

    def agree_on_rows(self) -> None:
        """Have the same rows on all processes as others have them."""
        self._look_for_processes()
        group = self.group
        layers = [one for one in self.roster.layers if one.is_trained and one.kind.has_rows]
        asked = [one for one in layers if may_be_due(one)]
        if group is not None and group.size() > 1:
            if self.sharded is None and not self.is_alike:  # else it was asked with the parts
                of_same(list(self.roster.group_of), self.roster.names, group)
                self.is_alike = True
            if not asked:
                return
            if self.sharded is not None:
                self.sharded.agree(asked)
                if not self.sharded.is_arranged():  # one has seen how a stack is used
                    self.arrange()
            else:
                kinds = [one.kind for one in asked]
                agree_on_rows(asked, group)
                if [one.kind for one in asked] != kinds:  # another has seen how a stack is used
                    self.stack_up()
        else:
            for layer in asked:
                layer.count_missed(called=layer.was_called, missed=layer.misses_rows())

    def _look_for_processes(self) -> None:
        """Know the processes of a wrapper of the model whose calls were compiled, in a first step.

        All of them look, whatever rows they have.
        """
        if self.has_looked or self.group is not None or not is_one_of_several():
            return
        self.has_looked = True
        weights = [one.weight for one in self.roster.layers if one.kind.has_rows]
        if weights:
            self.processes = processes_around(weights)

    def step(self, scales: Scales) -> None:
        """Take one step, with the rows of all processes."""
        if self.sharded is not None:
            if self.processes is None and self.sharded.world < dist.get_world_size():
                self.roster.warnings.once(APART)
            self.skipped = self.sharded.step(scales)
            if not (self.state and self.is_shown):
                self.sharded.show(self.state)
                self.is_shown = True
            return
        layers = self.roster.layers
        for layer in layers:
            if layer.pending and not may_be_due(layer):  # a script has changed T since
                layer.pending = {}
        if self.processes is not None:
            due = [one for one in layers if one.is_trained and is_due(one)]
            reduce_rows(due, self.processes, summed=self.summed)
        elif is_one_of_several() and any(layer.pending for layer in layers):
            self.roster.warnings.once(ALONE)
        ready, others = self.ready()
        if ready or others:
            self.take_step(ready, others, scales, matrices_of(layers))
        else:
            self.roster.check_parameters()

    def take_step(
        self, ready: list[Stack], others: list[nn.Parameter], scales: Scales, matrices: int
    ) -> None:
        """Change the parameters of these stacks, and these others, of a model of `matrices`."""
        groups = [g for g in self.roster.groups if g["params"]]
        chosen = {id(g): settings_of_step(g, matrices) for g in groups}
        given = [x for g in groups for x in arrays_of(chosen[id(g)], _fallback.settings_of(g))]
        known = finite.total([x**0.5 * 0.0 for x in given])  # NaN where one is negative too
        kind, graphs = None, self.graphs
        if graphs is not None and ready and (isinstance(known, Tensor) or known == 0.0):
            chosen = {id(g): on_device(chosen[id(g)], g["params"][0]) for g in groups}
            own = [p for stack in ready for layer in stack.layers for p in layer.parameters]
            rates = [x for s in chosen.values() for x in (s.lr, s.momentum, s.share)]
            inputs = [x for x in rates if isinstance(x, Tensor)]  # no momentum is none
            inputs += [x for x in (known,) if isinstance(x, Tensor)]
            inputs.append(self._skipped_on(inputs[0].device))
            kind = kind_of(ready, own + others, groups, inputs, scales, matrices)
        change = partial(self._change, ready, others, scales, chosen, known)
        found = change() if graphs is None or kind is None else graphs.take(kind, ready, change)
        if found is None:
            return
        skip = found[0] if found else None
        of_group: dict[int, list[nn.Parameter]] = {}
        for p in others:
            of_group.setdefault(id(self.roster.group_of[p]), []).append(p)
        how: dict[str, Any] = {"names": self.roster.names, "places": self.places}
        how |= {"rows": self._rows, "state": self.state, "skip": skip}
        for key, params in of_group.items():
            group, s = self.roster.group_of[params[0]], chosen[key]
            grads = [_unscaled(scales.grads, p) for p in params]
            wide = _fallback.step(group, params, grads, self.state, skip, s.warm)
            rounding.store(params, wide, group, **how)

    def _change(
        self,
        ready: list[Stack],
        others: list[nn.Parameter],
        scales: Scales,
        chosen: Mapping[int, StepSettings],
        known: Any,
    ) -> list[Tensor] | None:
        """Change the parameters of these stacks, with these settings by the `id` of a group.

        `known` is finite if all settings are, and none is negative.

        Returns:
            Of an accelerator, 1 where nothing may change, else 0. None if the host knows that
            nothing may change, and nothing if it knows that all may.
        """
        layers = [layer for stack in ready for layer in stack.layers]
        moving = [p for layer in layers for p in layer.parameters if p.grad is not None]
        moving += others
        of = partial(_unscaled, scales.grads)
        raw = partial(_unscaled, None)
        norms, rows = finite.norms({p: raw(p) for p in moving}, scales.grads)
        sizes = [x for layer in layers for x in layer.sizes()] + scales.sizes()
        size = self._of_all(finite.total([*rows, *sizes, known]))
        ok = bad = None
        if isinstance(size, Tensor):
            ok = size < math.inf
            bad = ~ok
        elif not math.isfinite(size):
            self._skip(self._not_finite(norms, layers))
            return None

        of_group = self.roster.group_of
        given = Gradients(of, raw, norms, lambda p: chosen[id(of_group[p])], scales, ok, bad)
        with scratch.lent(self._scratch):
            moved = self._advance(ready, given)
        if ok is None or bad is None:  # then nothing was masked
            still = [stack for stacks, m in moved if not m for stack in stacks]
            if still:
                names = [layer.name for stack in still for layer in stack.layers]
                self._skip({"natural gradient": names})
            return []
        all_moved = [m.to(ok.device) for _, m in moved] or [ok]  # only if ok
        found = torch.stack(all_moved).all() if len(all_moved) > 1 else all_moved[0]
        count = self._skipped_on(found.device)
        count.add_((~found).to(count.device))
        return [bad.to(torch.float32)]

    def _advance(self, ready: list[Stack], given: Gradients) -> list[tuple[Sequence[Stack], Any]]:
        """Change what belongs to layers, and return stacks and whether they moved."""
        steps_so, on_host = partial(bundle_step.steps_so, given=given), given.ok is None
        now, waiting = bundled(ready, steps_so, self.bundles, self.stacks, on_host=on_host)
        self.bundles = now + waiting
        devices = {stack.device for stack in ready}
        alone = given.ok is None or devices == {given.ok.device}
        on = {device: given if alone else given.on(device) for device in devices}
        moved: list[tuple[Sequence[Stack], Any]] = []
        for bundle in now:
            moved += bundle_step.advance(bundle, self.state, on[bundle.stacks[0].device])
        together = {stack for bundle in now for stack in bundle.stacks}
        others = [stack for stack in ready if stack not in together]
        return moved + [([stack], advance(stack, self.state, on[stack.device])) for stack in others]

    def _of_all(self, size: Any) -> Any:
        """The sum over all that step together of what is finite if their gradients and rows are."""
        return size

    def _skipped_on(self, device: torch.device) -> Tensor:
        """How many steps changed nothing, as a number of a device, which need not be waited for."""
        if not isinstance(self.skipped, Tensor):
            self.skipped = torch.full((), self.skipped, dtype=torch.float32, device=device)
        return self.skipped

    def count_skipped(self) -> int:
        """How many steps changed nothing, with a warning if any (a host sync)."""
        count = int(self.skipped)
        if count and not self.roster.warnings.knows(_SKIPPED):
            # on an accelerator the step did not wait to know which it was
            there = {p: p.grad for p in self.roster.group_of if type(p.grad) is Tensor}
            self._warn(self._not_finite(finite.norms(there)[0], []))
        return count

    def _skip(self, what: Mapping[str, Sequence[str]]) -> None:
        self.skipped += 1
        self._warn(what)

    def _not_finite(
        self, norms: Mapping[nn.Parameter, Any], layers: Sequence[Layer]
    ) -> dict[str, list[str]]:
        """What of gradients and rows is not finite. The host may have to wait to know."""
        names = {p: self.roster.names.get(p, "a parameter") for p in norms}
        return {
            "gradient": [names[p] for p, norm in norms.items() if not math.isfinite(norm)],
            "squared gradient": [
                names[p] for p, norm in norms.items() if not finite.has_room(norm, p.dtype)
            ],
            "curvature": [
                layer.name
                for layer in layers
                if not all(bool(x.isfinite().all()) for x in layer.sizes())
            ],
        }

    def _warn(self, what: Mapping[str, Sequence[str]]) -> None:
        kind, names = next(((k, n) for k, n in what.items() if n), ("", ()))  # causes come first
        if len(names) > 1:
            text = f"the {kind}s of {listed(names)} were"
        else:
            other = "a setting was negative, or it or a gradient or row was"
            text = f"the {kind} of {names[0]!r} was" if names else other
        self.roster.warnings.once(
            f"{text} NaN or infinite: the step changed nothing. "
            "`optimizer.skipped` counts such steps",
            about=_SKIPPED,
        )


def _unscaled(scale: Any, p: nn.Parameter) -> Tensor:
    """The gradient of a parameter, zeros where a layer's weight or bias has none."""
    if p.grad is None:
        return torch.zeros_like(p)
    if isinstance(scale, Tensor):
        scale = scale.to(p.device)
    return p.grad if scale is None else ranged(p.grad) / scale
