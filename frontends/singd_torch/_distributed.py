"""Data parallelism: the rows of all processes, summed in one collective."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from singd_torch._groups import plain_name
from singd_torch.layers.layer import IN_THE_LOSS, Layer
from singd_torch.layers.source import Source
from singd_torch.sharding.guards import holders

_JOIN = (
    "SINGD sums rows over all processes in its steps, and would wait for ever for a process whose "
    "data ends before others' do: give all as many batches, as DistributedSampler does, and call "
    "join(throw_on_early_termination=True), or leave join() out"
)
_OTHERS = (
    "layers of one optimizer are in DistributedDataParallel wrappers of the processes {} and {}, "
    "and rows of all layers are summed over the same processes: give each wrapper an optimizer of "
    "its own"
)
_DESTROYED = (
    "the process group that this optimizer steps with was destroyed: call state_dict() before "
    "destroy_process_group(), and load it into another optimizer after init_process_group()"
)


def unwrapped(model: Any) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """The model inside `torch.compile` and DistributedDataParallel, and the wrapper's processes."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel):
        return getattr(model.module, "_orig_mod", model.module), model.process_group
    return model, None


def processes_of_call() -> dist.ProcessGroup | None:
    """The processes of the DistributedDataParallel wrapper whose forward pass this is part of.

    Raises:
        RuntimeError: If some of them may take fewer steps than others.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    return None if wrapper is None else _processes_of(wrapper)


def is_averaged() -> bool | None:
    """Whether the wrapper whose forward pass this is part of averages the gradients of it.

    None if this is part of none.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    return None if wrapper is None else wrapper.require_backward_grad_sync


def processes_around(weights: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """The processes of a DistributedDataParallel wrapper that has one of the weights, if any.

    A call of compiled code does not tell of which wrapper it is part.

    Raises:
        RuntimeError: If some of them may take fewer steps than others.
    """
    wrappers = holders(weights, DistributedDataParallel, lambda wrapper: wrapper)
    return next(map(_processes_of, wrappers), None)


def _processes_of(wrapper: DistributedDataParallel) -> dist.ProcessGroup:
    join = wrapper._join_config
    if join.enable and not join.throw_on_early_termination:
        raise RuntimeError(_JOIN)
    return wrapper.process_group


def check_are_same(one: dist.ProcessGroup, other: dist.ProcessGroup) -> None:
    """Refuse wrappers of other processes than those that rows are summed over.

    Raises:
        RuntimeError: Naming both.
    """
    if one is not other:
        ranks = [dist.get_process_group_ranks(group) for group in (one, other)]
        if ranks[0] != ranks[1]:
            raise RuntimeError(_OTHERS.format(*ranks))


def group_of(processes: Any) -> dist.ProcessGroup:
    """The group of all processes of a DeviceMesh, or the ProcessGroup that was given.

    Raises:
        TypeError: If it is neither.
        ValueError: If this process is not one of them.
    """
    if processes is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("processes: this process is not one of them")
    if isinstance(processes, DeviceMesh):
        mesh = processes if processes.ndim == 1 else processes._flatten()
        return mesh.get_group()
    if not isinstance(processes, dist.ProcessGroup):
        raise TypeError(f"processes={processes!r}: give a ProcessGroup or a DeviceMesh")
    return processes


def check_is_there(group: dist.ProcessGroup) -> None:
    """Refuse a group of processes that was destroyed.

    Raises:
        RuntimeError: Naming what to do.
    """
    if group.size() == 1:
        return
    try:
        dist.get_rank(group)
    except ValueError:
        raise RuntimeError(_DESTROYED) from None


def agree_on_rows(
    layers: Sequence[Layer], group: dist.ProcessGroup, flags: Sequence[int] | None = None
) -> list[int]:
    """Expect the same rows on all processes, which all have to call this with the same layers.

    One may have lost the rows of a layer, or met a use of its weight that the others did not.

    Returns:
        The largest of the flags that the processes have for each layer.
    """
    device = device_of_flags(group, layers[0].weight.device)
    own = [
        [
            _lost(layer),
            layer.was_called,
            layer.misses_rows(),
            flag,
            *_uses(layer),
        ]
        for layer, flag in zip(layers, flags or [0] * len(layers), strict=True)
    ]
    found = torch.tensor(own, dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=apart(group))
    largest = []
    for layer, (lost, called, missed, flag, *uses) in zip(layers, found.tolist(), strict=True):
        largest.append(int(flag))
        layer.count_missed(called=bool(called), missed=bool(missed))
        if lost and not layer.without_rows:
            elsewhere = "used on another process in a way that no rows tell"
            layer.lose_rows(IN_THE_LOSS if lost == _BY_CHOICE else elsewhere)
        elif layer.is_stack and sum(uses) > 1:
            layer.lose_rows("multiplied from both sides")
        elif layer.is_unturned and uses[1]:
            layer.turn()
        for swapped, is_used in enumerate(uses):
            if is_used:
                swapped = bool(swapped) and not layer.is_stack
                layer.know(Source(layer.weight, layer.kind, swapped=swapped))
    return largest


# By the group whose processes they have.
_APART: weakref.WeakKeyDictionary[Any, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def apart(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes, the same each time, for what the host wants to know.

    On the CPU calls of the group itself may meet calls of other threads, as of an `async_save`.
    """
    if group not in _APART:
        _APART[group] = another(group)
    return _APART[group]


def another(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of the same processes, which all call this."""
    return new_group(dist.get_process_group_ranks(group), str(dist.get_backend_config(group)))


def new_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A new group of processes, which all call this, and no others."""
    with _unbound(ranks):
        found = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
    assert isinstance(found, dist.ProcessGroup)
    return found


@contextlib.contextmanager
def _unbound(ranks: Sequence[int]) -> Iterator[None]:
    """Where not all processes are of these ranks, make no communicator from the one of all.

    If `init_process_group` was given a `device_id`, torch splits that one, and waits for all.
    """
    everyone: Any = dist.group.WORLD
    bound = everyone.bound_device_id
    if bound is None or len(ranks) == dist.get_world_size():
        yield
        return
    everyone.bound_device_id = None
    try:
        yield
    finally:
        everyone.bound_device_id = bound


def device_of_flags(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where processes tell each other what the host wants to know.

    It is the CPU where their group can, lest the host wait for an accelerator.
    """
    return torch.device("cpu") if "cpu:" in str(dist.get_backend_config(group)) else device


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of tensors, in float32, or in float64 if some are."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.reshape(-1).to(dtype) for t in tensors])


def is_any(found: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a process of a group has found something; all call this, with a device of theirs."""
    flag = torch.tensor(float(found), device=device_of_flags(group, device))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=apart(group))
    return bool(flag)


def gathered(found: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """What each process of a group has found, on all of them, which all call this.

    Each calls it with the device of its parameters: NCCL sends objects through the current device,
    which a script may have left at the first one.
    """
    every: list[Any] = [None] * dist.get_world_size(group)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        dist.all_gather_object(every, found, group=group)
    return every


def of_same(
    params: Sequence[nn.Parameter],
    names: Mapping[Any, str],
    group: dist.ProcessGroup,
    own: Iterable[Any] = repeat(None),
) -> list[list[Any]]:
    """What each process of a group has of its own for each parameter; all of them call this.

    Raises:
        ValueError: If a process has other parameters, or has them in another order.
    """
    here = [
        (plain_name(names.get(p, "")), tuple(p.shape), one)
        for p, one in zip(params, own, strict=False)
    ]
    device = params[0].device if params else torch.device("cpu")
    every = gathered(here, group, device)
    for each in zip_longest(*every):
        if len({None if one is None else one[:2] for one in each}) > 1:
            told = ["nothing" if one is None else f"{one[0]!r} {one[1]}" for one in each]
            raise ValueError(
                f"the processes have other parameters in one place: {', '.join(told)}. Give all of "
                "them the same parameters in the same order: a set has another order on each, and "
                "what is frozen on one alone is not given there"
            )
    return [[one for *_, one in of_one] for of_one in every]


# That a process takes no rows of a layer, as derivatives of it are in the loss.
_BY_CHOICE = 1


def _lost(layer: Layer) -> int:
    """Whether the rows of a layer are lost here; what somebody is warned of counts more."""
    if not layer.without_rows:
        return 0
    return _BY_CHOICE if layer.without_rows == IN_THE_LOSS else 2


def _uses(layer: Layer) -> tuple[bool, bool]:
    """Whether there are rows of inputs for K, and of gradients, where the weight is turned."""
    roles = {swapped for _, swapped in layer.roles()}
    if layer.is_stack:
        return bool(roles) and not layer.kind.is_turned, bool(roles) and layer.kind.is_turned
    return False in roles, True in roles


def reduce_rows(layers: Sequence[Layer], group: dist.ProcessGroup, *, summed: bool = False) -> None:
    """Give every process the pending rows of all, in one flattened all-reduce.

    DistributedDataParallel averages the gradients, so each belongs to a loss divided by the number
    of processes: the rows of C are to be divided by it, unless they are `summed`. A layer that
    some processes did not use takes part with zeros; all processes have to call this with the same
    layers.
    """
    world = dist.get_world_size(group)
    entries = [(layer, *own) for layer in layers for own in layer.all_pending().items()]
    tensors = [t for _, _, pending in entries for t in pending.tensors()]
    if not tensors:
        return
    flat = flattened(tensors)
    dist.all_reduce(flat, group=group)
    parts = iter(torch.split(flat, [t.numel() for t in tensors]))
    for layer, key, pending in entries:
        sums = [next(parts).reshape(t.shape).to(t.dtype) for t in pending.tensors()]
        # only a layer without calls before, or now, is asked, on the host, whether it has rows
        if (layer.rows_seen and layer.was_called) or sums[-2] > 0:
            mean = layer.group["loss_average"] is not None
            layer.pending[key] = pending.of_all(sums, 1 if summed else world, mean=mean)
