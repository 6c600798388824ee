"""Runs a function on several processes that are connected by gloo."""

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What a process would else import for seconds: it is forked off one that has it.
PRELOADED = [
    "pytest",
    "singd_torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.multiprocessing",
]
SECONDS = 60


def run(world: int, function: Callable[..., Any], *args: Any, connect: bool = True) -> list[Any]:
    """What the function returns on each of the processes, which are called `rank` and `world`.

    Without `connect` it has to make the group of processes itself.

    Raises:
        RuntimeError: With the traceback of the first process that failed or hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(rank, world, folder, function, args, connect))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(2 * SECONDS)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        found = [_read(folder, rank, process.exitcode) for rank, process in enumerate(processes)]
    errors = sorted((error for error, _ in found if error), key=_is_a_lost_connection)
    if errors or hung:
        raise RuntimeError(errors[0] if errors else f"the processes {hung} hang")
    return [result for _, result in found]


def _is_a_lost_connection(error: str) -> bool:
    """Whether it tells only that another process failed."""
    return "Connection closed by peer" in error


def _read(folder: str, rank: int, exitcode: int | None) -> tuple[str | None, Any]:
    path = Path(folder) / f"{rank}.pt"
    if not path.exists():
        return f"process {rank} left nothing and ended with exit code {exitcode}", None
    found: tuple[str | None, Any] = torch.load(path, weights_only=False)
    return found


def _worker(
    rank: int,
    world: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    connect: bool,
) -> None:
    torch.set_num_threads(1)
    error = result = None
    try:
        if connect:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=SECONDS),
            )
        result = function(rank, world, *args)
        if connect:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, result), f"{folder}/{rank}.pt")
