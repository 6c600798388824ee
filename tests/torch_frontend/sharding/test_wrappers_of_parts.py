"""Wrappers of parts of a model whose processes are not the same."""

import gloo
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD


def of_other_processes(rank: int, world: int, same: bool) -> str:
    """What one optimizer says of experts that are others on each process."""
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    everyone = dist.new_group([0, 1])
    body = DistributedDataParallel(nn.Linear(4, 3))
    group = everyone if same else alone
    expert = DistributedDataParallel(nn.Linear(3, 2), process_group=group)
    optimizer = SINGD(nn.ModuleList([body, expert]))
    try:
        expert(body(torch.randn(5, 4))).square().mean().backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_wrappers_of_other_processes_want_optimizers_of_their_own() -> None:
    for found in gloo.run(2, of_other_processes, False):
        assert "an optimizer of its own" in found


def test_groups_of_the_same_processes_are_one() -> None:
    assert gloo.run(2, of_other_processes, True) == ["", ""]
