"""Errors for models that cannot be trained as they are, before anything is changed."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

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
_ZERO = (
    "ZeroRedundancyOptimizer gives each process some of the parameters alone, and a step of SINGD "
    "depends on all of them. SINGD splits its state among processes by itself: in its place, call "
    "SINGD(wrapped, shard=True) with the DistributedDataParallel wrapper, or "
    "SINGD(model, processes=torch.distributed.group.WORLD, shard=True)"
)
_PLAIN_PARTS = (
    "DistributedDataParallel has made plain parameters of the parts that tensor parallelism has: "
    "nothing tells that they belong together. Call torch.distributed._composable."
    'replicate_with_fsdp.replicate(model, mesh=mesh["data"]) in its place, or fully_shard'
)
_PRIVATE = (
    "the gradients of {} were made private, example by example, and the factors would learn from "
    "rows that are neither clipped nor noised: what the privacy accountant says would be wrong. "
    "Build the optimizer from the parameters alone, SINGD(model.named_parameters()): it then "
    "learns from the private gradients, as AdamW does"
)
_GATHERED = (
    "a parameter was given that `fully_shard` had gathered for the time of a pass, and not its "
    "part: call model.reshard() before model.parameters()"
)


def check_model(model: nn.Module, given: Iterable[Tensor] = ()) -> None:
    """Refuse wrappers whose parameters, or those that are given, are no parameters of layers.

    Raises:
        TypeError: Naming what to use in their place.
        RuntimeError: If it is a stage of a pipeline, or a part of one.
    """
    params = [*model.parameters(), *given]
    _refuse_stages(params)
    refuse_flat(params)
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    makes_plain = any(getattr(hook, "__name__", "") == "_reconstruct_dtensor" for hook in hooks)
    if makes_plain or any(hasattr(p, "_st_info") for p in params):
        raise TypeError(_PLAIN_PARTS)
    if isinstance(model, nn.DataParallel):
        raise TypeError("nn.DataParallel is not supported: use DistributedDataParallel")


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


def refuse_private(weights: Mapping[str, Tensor]) -> None:
    """Refuse the rows of weights of which Opacus keeps the gradient of each example.

    Raises:
        RuntimeError: Naming the first of them.
    """
    for name, weight in weights.items():
        if hasattr(weight, "grad_sample"):
            raise RuntimeError(_PRIVATE.format(repr(name)))


def refuse_flat(params: Iterable[Tensor]) -> None:
    """Refuse parameters that FullyShardedDataParallel has flattened.

    Raises:
        TypeError: Naming what to use in its place.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise TypeError(_FLAT)


def refuse_zero_redundancy() -> None:
    """Refuse to be built by ZeroRedundancyOptimizer.

    Raises:
        TypeError: Naming what to use in its place.
    """
    callers = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    if "torch.distributed.optim.zero_redundancy_optimizer" in callers:
        raise TypeError(_ZERO)


def _refuse_stages(params: Iterable[Tensor]) -> None:
    """Refuse parameters of a stage of a pipeline, in whatever way its module is called."""
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None:
        return
    if holders(params, pipelining._PipelineStageBase, lambda stage: vars(stage).get("submod")):
        raise RuntimeError(_PIPELINE)


def holders(
    params: Iterable[Tensor], kind: type[T], module_of: Callable[[T], nn.Module | None]
) -> list[T]:
    """The objects of a kind that are used, and whose module has one of the parameters."""
    own = set(params)

    def found() -> list[T]:
        every = [x for x in gc.get_objects() if issubclass(type(x), kind)]  # asks nothing of others
        pairs = [(x, module_of(x)) for x in every]
        return [x for x, m in pairs if m is not None and any(p in own for p in m.parameters())]

    if not found():
        return []
    gc.collect()  # it may be one that is used no more
    return found()
