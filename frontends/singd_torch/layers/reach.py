"""What a backward pass does with a weight."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


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
        with torch.enable_grad():
            view = leaf.view_as(leaf).grad_fn
        node = None if view is None else view.next_functions[0][0]
        assert node is not None
        try:
            reached = torch._C._will_engine_execute_node(node)
        except RuntimeError:  # torch says so of a leaf that torch.autograd.grad was asked for
            return cls.RETURNED
        return cls.ADDED if reached else cls.NOT


def is_in_parts(weight: Tensor) -> bool:
    """Whether several processes have parts of a weight: then it is a DTensor."""
    return type(weight) not in (Tensor, nn.Parameter)


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
