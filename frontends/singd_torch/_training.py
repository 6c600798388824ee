"""What a training loop calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from singd_core import _settings
from singd_torch._changed import Known
from singd_torch._distributed import check_is_there
from singd_torch._groups import settings_of
from singd_torch._uncompiled import uncompiled
from singd_torch._warnings import listed
from singd_torch.capture import scaling
from singd_torch.capture.scaling import Given
from singd_torch.capture.watcher import Watcher
from singd_torch.layers.due import is_due, is_refresh
from singd_torch.layers.layer import IN_THE_LOSS, MOST_MISSED, Layer
from singd_torch.layers.reach import part_again
from singd_torch.layers.roster import GONE, Roster
from singd_torch.sharding.guards import (
    check_model,
    refuse_flat,
    refuse_gathered,
    refuse_private,
)
from singd_torch.step.stepper import Stepper
from singd_torch.tensors.exact import without_autocast
from singd_torch.tensors.pieces import placed


class Training(torch.optim.Optimizer):
    """An optimizer with a roster of its parameters, a watcher of rows, and a stepper.

    Attributes:
        state: Tensors by parameter. The tensors of layers are views of the tensors of stacks.
        param_groups: The groups of parameters and their settings.
    """

    _watches: ClassVar[type[Watcher]] = Watcher

    def _begin(self, model: nn.Module) -> None:
        """Begin with a model, before any layer is known."""
        self._roster = Roster(model)
        self._stepper = Stepper(self._roster, {})
        self._watcher = self._watches(self._roster, self._stepper)
        self._given_scale: Given | None = None
        self._is_checked, self._known = False, Known()

    @property
    def _layers(self) -> list[Layer]:
        return self._roster.layers

    def _route(self) -> None:
        """Decide which parameters form layers, keeping what is known of those that stay."""
        self._place_rates()
        params = [p for group in self.param_groups for p in group["params"]]
        refuse_gathered(params)
        refuse_flat(params)
        self._roster.groups, self._stepper.state = self.param_groups, self.state
        for p in self._roster.find():
            self.state[p].clear()
        self._roster.let_go(self.state)
        self._stepper.arrange()
        self._watcher.watch()
        self._known = Known(self.param_groups, self.defaults)

    def _place_rates(self) -> None:
        """Have rates in the memory of devices, where a CUDA graph reads them as they are then."""
        for group in self.param_groups if self._stepper.capturable else ():
            for p in group["params"][:1]:
                for name in ("lr", "largest_lr"):
                    rate = group[name]
                    dtype = rate.dtype if isinstance(rate, Tensor) else torch.float32
                    group[name] = placed(rate, dtype, p.device)

    # ---- what happened to the model -------------------------------------------------------------

    def _follow_model(self) -> None:
        """Notice what happened to the model after construction, at steps that may have rows."""
        if not any(is_refresh(group) for group in self.param_groups):
            return
        refuse_private({one.name: one.weight for one in self._layers if one.kind.has_rows})
        names = self._roster.untrained()
        if self._stepper.sharded is not None:  # lest one process alone find layers anew
            self._roster.check_parameters()
        elif self._roster.makeup.is_other():
            self._renew()
        if names:
            self._roster.warnings.once(
                f"the model's parameter {names[0]!r} has a gradient and is in no parameter group, "
                f"so that it is not trained ({len(names)} such in all): build the optimizer after "
                "what adds, replaces or unfreezes parameters, or "
                "optimizer.add_param_group({'params': ...})",
                about="untrained",
            )

    def _renew(self) -> None:
        """Find the layers of a model anew, which is made of other modules or parameters by now."""
        before = {layer.weight: layer for layer in self._layers}
        self._route()
        found = [(layer, before.get(layer.weight)) for layer in self._layers]
        others = [one for one, old in found if old is not None and not old.is_found_as(one)]
        for layer in [*others, *(one for one, old in found if old is None)]:
            layer.refreshes = layer.missed = 0
            layer.by_gradient = False
            if layer.can_do_without():  # its rows come with the next step
                self._stepper.go_on_by_gradients(layer)
        self._stepper.stack_up()
        names = [one.name for one in others if not one.name.endswith(GONE)]
        if names:
            self._roster.warnings.once(
                f"the model was changed after the optimizer was built, and {names[0]!r} is used "
                f"in another way ({len(names)} such in all): its factors and its momentum begin "
                "anew, and print(optimizer) shows by which rule; build the optimizer after what "
                "prunes, parametrizes, ties or patches modules"
            )

    def _part_with_rows(self) -> None:
        """Train layers without rows from now on, whose rows would not tell the gradient.

        Checkpoints have that.
        """
        lost = [layer for layer in self._layers if layer.without_rows]
        for layer in lost:
            layer.notes["without_rows"] = layer.without_rows
        expected = [
            layer
            for layer in lost
            if (layer.has_modules or layer.was_called) and layer.without_rows != IN_THE_LOSS
        ]
        for reason in dict.fromkeys(layer.without_rows for layer in expected):
            names = [layer.name for layer in expected if layer.without_rows == reason]
            each, are = ("it", "it is") if len(names) == 1 else ("each", "they are")
            self._roster.warnings.once(
                f"no rows of {listed(names)} are taken, since {each} is {reason}: {are} trained "
                "without; print(optimizer) shows every such layer, and why"
            )
        if lost:
            self._route()

    def _warn_missed(self) -> None:
        """Warn of layers whose rows came before, when they have been missing for long enough."""
        missed = [layer for layer in self._layers if layer.missed == MOST_MISSED]
        layers = [layer for layer in missed if layer.rows_seen]
        if layers:
            goes_on = all(layer.is_lost() for layer in layers)
            what = "gradients alone refresh the factors" if goes_on else "the factors stay"
            names = [layer.name for layer in layers]
            self._roster.warnings.once(
                f"no rows of {listed(names)} have come for {MOST_MISSED} refreshes in a row, and "
                "gradients have: weights are used without calls of their modules by now, as by "
                f"compiled functions, or zero_grad follows backward. Until rows come again, {what}",
                about=f"missed {names}",
            )

    # ---- steps ----------------------------------------------------------------------------------

    @uncompiled("SINGD steps outside of graphs; see SINGD(compile_step=True)")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. It changes nothing, and is counted, if what it is given is not finite.

        Args:
            closure: Evaluates the model, calls `backward` and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: If a gradient is sparse, or the model has other parameters by now, or has
                them in parts.
            ValueError: If a setting of a group was changed to a wrong value.
        """
        self._known.check(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast(self._roster.group_of):
            self._step()
        return loss

    def _step(self) -> None:
        roster, stepper, watcher = self._roster, self._stepper, self._watcher
        if stepper.group is not None:
            check_is_there(stepper.group)
        if stepper.sharded is not None:
            stepper.sharded.check_memory()
        stepper.state = self.state  # a script may have given it another
        if not self._known.has(self.param_groups):
            self._renew()
        elif roster.is_switched:
            watcher.follow()
        elif roster.is_regrouped():
            self._renew()
        if not self._is_checked:
            check_model(roster.model, roster.group_of)  # it may have been wrapped since
            self._is_checked = True
        roster.check_shapes(roster.group_of)
        roster.check_dense()
        watcher.queue.flush()
        if not self.state and stepper.is_no_step:
            stepper.begin()
            return
        roster.warn_idle()
        roster.warn_small()
        if stepper.sharded is not None:
            part_again(roster.model)  # lest modules keep weights that are old then
        self._follow_model()
        watcher.leave_joined()
        watcher.end_proofs()
        watcher.warn_unused_mask()
        stepper.agree_on_rows()
        self._warn_missed()
        self._part_with_rows()
        stepper.step(scaling.scales(self, self._given_scale))
        self._count()
        watcher.mask = self._given_scale = None

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += 1
        self._watcher.forget(stepped=True)

    @property
    def replayable(self) -> bool:
        """Whether a CUDA graph of an earlier step may take the place of the next step.

        It may if the next step neither refreshes factors, nor measures for a refresh, nor warms up.
        Then nothing in it depends on the number of steps. Never without `capturable=True`.
        """
        if not self._stepper.capturable or self._stepper.sharded is not None:
            return False
        for group in self.param_groups:
            steps, s = group["steps"], settings_of(group)
            if steps < s.warmup or _settings.is_due(steps, s) or _settings.is_due(steps + 1, s):
                return False
        return not any(layer.is_trained and is_due(layer) for layer in self._layers)

    def replayed(self) -> None:
        """Count a step that a CUDA graph has taken in the place of `step`.

        Raises:
            RuntimeError: If this step was not `replayable`.
        """
        if not self.replayable:
            raise RuntimeError(
                "this step was to refresh the factors, to measure for that or to warm up: take it "
                "with step(), and replay a graph only where optimizer.replayable"
            )
        self._count()

    @property
    def skipped(self) -> int:
        """How many steps changed nothing: gradients, rows or settings were not finite (a sync)."""
        return self._stepper.count_skipped()

    def set_current_grad_scale(self, scale: Any, *, unscaled: bool = False) -> None:
        """Set the number that multiplied the loss of the next step: it is divided out again.

        With torch.amp.GradScaler you need not call it.

        Args:
            scale: The scale, a number or 0-d.
            unscaled: Whether the gradients have been divided by it already, as for clipping.
        """
        self._given_scale = Given(scale, unscaled)

    @uncompiled("it forgets rows")
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them the rows that were captured."""
        super().zero_grad(set_to_none)
        self._watcher.forget()

    # ---- which rows count -----------------------------------------------------------------------

    def sampled_labels(self) -> AbstractContextManager[None]:
        """Take the rows of this step only from backward passes inside the block.

        Labels sampled from the model's own predictions make the factors approximate the Fisher
        matrix instead of the empirical one. Gradients come only from passes outside the block:

            with optimizer.sampled_labels():
                F.cross_entropy(logits, sample(logits)).backward(retain_graph=True)
        """
        return self._watcher.sampled_labels()

    def no_rows(self) -> AbstractContextManager[None]:
        """Take no rows from backward passes inside the block.

        Use it for passes that reach the weights but do not differentiate the training loss:
        Hessian-vector products, gradient norms of single tasks, sharpness. (Passes that reach no
        weight, such as derivatives with respect to inputs, bring no rows anyway.)

            with optimizer.no_rows():
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        """
        return self._watcher.no_rows()

    def mask_rows(self, mask: Tensor | None) -> None:
        """Leave rows out of the factors until the next step, such as rows of padding.

        Args:
            mask: Boolean, shape (batch, ...), False at positions that are left out. It holds for
                layers whose input has these first axes, and only for their factors: the loss has to
                leave the positions out by itself. A step warns of one that fits no layer. None is
                no mask.

        Raises:
            TypeError: If the mask is not boolean.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask_rows wants a boolean mask, not {mask.dtype}: give mask.bool()")
        self._watcher.mask = mask
