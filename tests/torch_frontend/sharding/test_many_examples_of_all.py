"""Steps with more examples than `rows`, of all processes together."""

import gloo
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from singd_torch import SINGD

N = 60
ROWS = 50  # more than a process has examples, and fewer than all have


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8)
    ).double()


def train(rank: int, world: int, how: str) -> list[Tensor]:
    """The parameters after steps of processes that have a part of the batch each."""
    model: nn.Module = network()
    generator = torch.Generator().manual_seed(1)
    shapes = (N, 2, 6), (N, 8)
    whole = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, y = (t.chunk(world)[rank] for t in whole)
    if how == "parts":
        fully_shard(model)
    elif how != "one":
        model = DistributedDataParallel(model)
    optimizer = SINGD(model, rows=ROWS, shard=how == "shard")
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert {layer.has_rows for layer in optimizer._layers} == {False}
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.data for p in model.parameters()]


@pytest.mark.parametrize("how", ["copies", "parts", "shard"])
def test_examples_of_all_processes_count(how: str) -> None:
    expected = train(0, 1, "one")
    for found in gloo.run(2, train, how):
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
