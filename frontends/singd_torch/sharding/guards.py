"""Errors for models in parts that cannot be trained, before anything is."""

from __future__ import annotations

import sys
from types import FrameType

import torch.distributed as dist
from torch import nn

ALONE = (
    "this is one of several processes, and nothing tells which of them train one model: each takes "
    "factors of its own rows alone, and copies of a model drift apart. Give SINGD the model in its "
    "DistributedDataParallel wrapper, or the group of processes whose gradients you average: "
    "SINGD(model, processes=torch.distributed.group.WORLD)"
)
_PIPELINE = (
    "SINGD does not train the stages of a pipeline: a schedule scales gradients after the rows of "
    "its micro-batches were taken, and the rows of the other stages are not known. Take AdamW for "
    "stages, or shard the model by fully_shard or parallelize_module in place of stages"
)
_FLAT = (
    "FullyShardedDataParallel keeps parts of flattened parameters, which are no matrices: call "
    "torch.distributed.fsdp.fully_shard(model), then SINGD(model)"
)


def check_model(model: nn.Module) -> None:
    """Refuse wrappers whose parameters are no parameters of layers.

    Raises:
        TypeError: Naming what to use in their place.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError("nn.DataParallel is not supported: use DistributedDataParallel")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported for this: it takes a second
    if fsdp is not None:
        wrapper = fsdp.FullyShardedDataParallel
        if any(isinstance(module, wrapper) for module in model.modules()):
            raise TypeError(_FLAT)


def is_one_of_several() -> bool:
    """Whether other processes run beside this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_stages() -> None:
    """Refuse a forward pass by a stage of a pipeline.

    Raises:
        RuntimeError: If a stage is among the callers.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # their variables are not looked at: that would keep them alive
        if frame.f_code.co_filename == pipelining.__file__:
            raise RuntimeError(_PIPELINE)
        frame = frame.f_back
