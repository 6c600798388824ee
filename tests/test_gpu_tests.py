"""The tests that need a GPU can be read everywhere, and skip with a reason where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "frontends")])
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
    )


def test_without_a_gpu_they_skip_and_say_so():
    done = run("-k", "cupy or bfloat16 or law")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" not in done.stdout
    for reason in ("no GPU for cupy: singd_cupy", "no GPU for torch", "no library finds a GPU"):
        assert reason in done.stdout


@pytest.mark.slow
def test_what_they_check_holds_on_the_cpu():
    done = run("-k", "not jax and not law", SINGD_GPU_SUBSTITUTE="1")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
