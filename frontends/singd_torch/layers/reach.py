"""What a backward pass does with a weight."""

from __future__ import annotations

import dataclasses
import enum
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from singd_torch.sharding import is_in_parts


class Reach(enum.Enum):
    """What the backward pass that runs does with the gradient of a weight."""

    NOT = enum.auto()  # it is a derivative with respect to something else
    ADDED = enum.auto()  # to `weight.grad`, by `backward`
    RETURNED = enum.auto()  # by `torch.autograd.grad`
    UNKNOWN = enum.auto()  # the weight is in parts, and nobody has what was gathered from them

    @classmethod
    def of(cls, leaf: Tensor | None) -> Reach:
        """How the backward pass that runs reaches a leaf."""
        if leaf is None:
            return cls.UNKNOWN
        if not leaf.requires_grad:  # it was frozen when the call was made, or has been since
            return cls.NOT
        with torch.enable_grad():
            view = leaf.view_as(leaf).grad_fn
        node = None if view is None else view.next_functions[0][0]
        if node is None:  # as inside torch.cond, whose pass runs in a trace without weights
            return cls.NOT
        try:
            reached = torch._C._will_engine_execute_node(node)
        except RuntimeError:  # torch says so of a leaf that torch.autograd.grad was asked for
            return cls.RETURNED
        return cls.ADDED if reached else cls.NOT


@dataclasses.dataclass
class Pass:
    """A backward pass that brought rows of a weight.

    Attributes:
        number: Its number, which all calls from one pass have in common.
        reach: What it did with the gradient.
        left: The gradient that was there when it was over, by identity and version, if one was.
        runs_in: The thread in which it began, None when it is over.
    """

    number: int = -1
    reach: Reach = Reach.NOT
    left: tuple[int, int] | None = None
    runs_in: int | None = dataclasses.field(default_factory=threading.get_ident)

    def end(self, weight: Tensor) -> None:
        """Know the gradient that is there now."""
        if self.reach is Reach.UNKNOWN and weight.grad is not None:
            self.reach = Reach.ADDED  # `fully_shard` has gathered the weight in this pass
        self.left, self.runs_in = _version(weight), None

    def is_dropped(self, weight: Tensor, reach: Reach) -> bool:
        """Whether nobody steps along its gradient, as the pass that runs now, and its reach, tell.

        What it added may have been taken away since, as by `model.zero_grad()`: only a gradient
        that somebody has changed is asked for its numbers. Or `backward` adds now, and nobody has
        written to the gradient what `torch.autograd.grad` had returned. Of a pass that goes on in
        another thread the gradient is still to come.
        """
        if self.runs_in not in (None, threading.get_ident()):
            return False
        if self.reach is Reach.RETURNED:
            return reach is Reach.ADDED and self.left == _version(weight)
        if self.reach is not Reach.ADDED or weight.grad is None:
            return self.reach is Reach.ADDED
        return self.left != _version(weight) and not bool(weight.grad.any())

    def is_replaced(self, weight: Tensor) -> bool:
        """Whether somebody has put another gradient in the place of the one that it left."""
        now = _version(weight)
        if self.reach is not Reach.ADDED or self.left is None or now is None:
            return False
        return now[0] != self.left[0] or now[1] < self.left[1]


def _version(weight: Tensor) -> tuple[int, int] | None:
    """The gradient of a weight and how often it was changed; None of none, and of one in parts."""
    grad = weight.grad
    return None if grad is None or is_in_parts(weight) else (id(grad), grad._version)


def is_zero(gradient: Tensor) -> bool:
    """Whether a gradient has zeros alone, or the part that is here where processes have parts."""
    here = gradient.to_local() if is_in_parts(gradient) else gradient
    return not bool(here.any())


def part_again(model: nn.Module) -> None:
    """Let modules have their parts of parameters, which `fully_shard` may have gathered for them.

    A backward pass gathers them by itself.
    """
    for module in _gathering(model):
        module.reshard()


def gathers(model: nn.Module) -> bool:
    """Whether there are modules for which `fully_shard` gathers parameters."""
    return any(True for _ in _gathering(model))


def _gathering(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = None if fsdp is None else getattr(fsdp, "FSDPModule", None)
    return (module for module in model.modules() if kind is not None and isinstance(module, kind))
