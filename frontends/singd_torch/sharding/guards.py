"""Errors for models in parts that cannot be trained, before anything is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable

import torch.distributed as dist
from torch import Tensor, nn

ALONE = (
    "this is one of several processes, and nothing tells which of them train one model: each takes "
    "factors of its own rows alone, and copies of a model drift apart. Give SINGD the model in its "
    "DistributedDataParallel wrapper, or the group of processes whose gradients you average: "
    "SINGD(model, processes=torch.distributed.group.WORLD)"
)
APART = (
    "the model is in parts on some of the processes, and nothing tells whether others train copies "
    "of these parts, which then drift apart. Give SINGD(model, processes=mesh) the whole mesh, "
    "with the axes along which gradients are averaged; or, if there are no copies, the mesh of the "
    "parts"
)
_PIPELINE = (
    "SINGD does not train the stages of a pipeline: a schedule scales gradients after the rows of "
    "its micro-batches were taken, and one stage does not know that another skips a step. Take "
    "AdamW for stages, or shard the model by fully_shard or parallelize_module in place of stages"
)
_FLAT = (
    "FullyShardedDataParallel keeps parts of flattened parameters, which are no matrices: call "
    "torch.distributed.fsdp.fully_shard(model), then SINGD(model)"
)
_PLAIN_PARTS = (
    "DistributedDataParallel has made plain parameters of the parts that tensor parallelism has: "
    "nothing tells that they belong together. Call torch.distributed._composable."
    'replicate_with_fsdp.replicate(model, mesh=mesh["data"]) in its place, or fully_shard'
)
_GATHERED = (
    "a parameter was given that `fully_shard` had gathered for the time of a pass, and not its "
    "part: call model.reshard() before model.parameters()"
)


def check_model(model: nn.Module) -> None:
    """Refuse wrappers whose parameters are no parameters of layers.

    Raises:
        TypeError: Naming what to use in their place.
        RuntimeError: If it is a stage of a pipeline, or a part of one.
    """
    refuse_stages(model.parameters())
    if any(hasattr(p, "_st_info") for p in model.parameters()):
        raise TypeError(_PLAIN_PARTS)
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


def refuse_gathered(params: Iterable[Tensor]) -> None:
    """Refuse parameters without memory, which is how `fully_shard` leaves what it had gathered.

    Raises:
        ValueError: If there is one.
    """
    plain = (p for p in params if type(p) is nn.Parameter and p.numel())
    if any(p.untyped_storage().nbytes() == 0 for p in plain):
        raise ValueError(_GATHERED)


def refuse_stages(params: Iterable[Tensor]) -> None:
    """Refuse parameters of a stage of a pipeline, in whatever way its module is called.

    Raises:
        RuntimeError: If there is such a stage.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None:
        return
    own, kind = set(params), pipelining._PipelineStageBase
    if _is_in_stage(own, kind):
        gc.collect()  # it may be one that is used no more
        if _is_in_stage(own, kind):
            raise RuntimeError(_PIPELINE)


def _is_in_stage(params: Collection[Tensor], kind: type) -> bool:
    """Whether an object of this kind has a module with one of the parameters."""
    stages = [x for x in gc.get_objects() if issubclass(type(x), kind)]  # asks nothing of others
    modules = [vars(stage).get("submod") for stage in stages]
    return any(p in params for module in modules if module is not None for p in module.parameters())
