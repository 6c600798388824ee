"""The programs of the page Many GPUs run as torchrun would start them; Accelerate parts a model."""

import os
import re
import socket
from pathlib import Path

import gloo
import models
import pytest
from test_fully_shard import check, whole
from torch import Tensor

from singd_torch import SINGD

PAGE = Path(__file__).parents[3] / "docs" / "many_gpus.md"
PROGRAMS = re.findall(r"### (.*?)\n.*?```python no-run\n(.*?)```", PAGE.read_text(), re.DOTALL)


def surroundings(rank: int, world: int, port: int) -> None:
    """The variables that torchrun sets."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "TORCHELASTIC_RUN_ID": "none",
        "CUDA_VISIBLE_DEVICES": "",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def program(rank: int, world: int, code: str, folder: str, port: int) -> None:
    surroundings(rank, world, port)
    os.chdir(folder)
    import torchvision_on_cpu  # noqa: F401

    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})


def test_the_page_has_programs() -> None:
    assert len(PROGRAMS) == 8


def run(world: int, name: str, folder: Path) -> None:
    code = dict(PROGRAMS)[name]
    for trainer in ("accelerate", "lightning"):
        if f"from {trainer} import" in code or f"import {trainer}\n" in code:
            pytest.importorskip(trainer)
    gloo.run(world, program, code, str(folder), free_port(), connect=False)


QUICK = PROGRAMS[0][0]


@pytest.mark.slow
def test_the_first_program_of_the_page_runs_on_two_processes(tmp_path: Path) -> None:
    run(2, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [name for name, _ in PROGRAMS if name != QUICK])
def test_a_program_of_the_page_runs(name: str, world: int, tmp_path: Path) -> None:
    run(world, name, tmp_path)


def accelerated(rank: int, world: int, port: int) -> tuple[dict[str, Tensor], str]:
    surroundings(rank, world, port)
    import accelerate

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    accelerator = accelerate.Accelerator(cpu=True)
    # It takes the plugin where there are GPUs alone; what it then does needs none.
    vars(accelerator.state).update(
        distributed_type=accelerate.DistributedType.FSDP, fsdp_plugin=plugin
    )
    model = models.new("characters")
    singd = SINGD(model, **models.settings("characters"))
    model, optimizer = accelerator.prepare(model, singd)
    with models.exact_counts():
        for batch in models.data("characters"):
            accelerator.backward(models.loss(model, *models.part_of(batch, rank, world)))
            optimizer.step()
            optimizer.zero_grad()
    return models.weights(model), repr(singd)


@pytest.mark.slow
def test_a_model_that_accelerate_parts_after_construction_trains_like_that_of_one_process() -> None:
    pytest.importorskip("accelerate")
    found = gloo.run(2, accelerated, free_port(), connect=False)
    assert "its parts" in found[0][1]
    check([weights for weights, _ in found], whole("characters", {}))
