"""The stages of a pipeline are refused, with every schedule."""

from typing import Any

import gloo
import pytest
import torch
from test_guards import data, network
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
)

from singd_torch import SINGD

SCHEDULES = {
    "GPipe": lambda stage, loss: ScheduleGPipe(stage, 2, loss_fn=loss),
    "1F1B": lambda stage, loss: Schedule1F1B(stage, 2, loss_fn=loss),
    "zero bubble": lambda stage, loss: ScheduleInterleavedZeroBubble([stage], 2, loss_fn=loss),
}


def staged(rank: int, world: int, name: str, how: str) -> None:
    """A stage for each process, which SINGD refuses and AdamW then trains."""
    model = network()
    own = [model[:2], model[2:]][rank] if world > 1 else model
    if how == "compiled":
        own.compile(backend="aot_eager")

    def stages() -> Any:
        stage = PipelineStage(own, rank, world, torch.device("cpu"))
        return SCHEDULES[name](stage, nn.functional.cross_entropy)

    def run(schedule: Any) -> None:
        x, y = data(0)
        schedule.step(*([x] if rank == 0 else []), **({"target": y} if rank == world - 1 else {}))

    if how == "stage first":
        schedule = stages()
        with pytest.raises(RuntimeError, match="stages of a pipeline") as error:
            SINGD(own)
    else:
        optimizer = SINGD(own)
        schedule = stages()
        run(schedule)
        before = [p.detach().clone() for p in own.parameters()]
        with pytest.raises(RuntimeError, match="stages of a pipeline") as error:
            optimizer.step()
        assert all(map(torch.equal, before, own.parameters()))
        del optimizer
    assert "Take AdamW for stages" in str(error.value)
    del error
    adamw = torch.optim.AdamW(own.parameters())
    before = [p.detach().clone() for p in own.parameters()]
    run(schedule)
    adamw.step()
    assert not any(map(torch.equal, before, own.parameters()))
    if world == 1:
        del schedule
        assert SINGD(own).state_dict()  # the model is no stage any more


@pytest.mark.parametrize("how", ["stage first", "optimizer first"])
def test_a_stage_of_a_pipeline_is_refused_at_once(how: str) -> None:
    gloo.run(1, staged, "GPipe", how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stage first", "optimizer first", "compiled"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_are_refused_with_every_schedule(name: str, how: str) -> None:
    gloo.run(2, staged, name, how)
