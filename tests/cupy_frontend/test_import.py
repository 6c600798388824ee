"""Importing `singd_cupy` where it cannot work says why, and shows nothing of CuPy's inside."""

import os
import subprocess
import sys

import pytest

NO_CUPY = "import sys; sys.modules['cupy'] = None; import singd_cupy"
NO_DRIVER = "import singd_cupy"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (NO_CUPY, "singd_cupy needs CuPy: pip install cupy-cuda13x"),
        (NO_DRIVER, "is installed, but finds no GPU or no CUDA driver"),
    ],
    ids=["without CuPy", "without a driver"],
)
def test_the_message_names_what_is_missing_and_the_way_out(code, expected):
    # An empty list of devices is what CuPy sees where there is a driver but no GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    *frames, message = done.stderr.strip().splitlines()
    assert message.startswith("ImportError: singd_cupy")
    assert expected in message
    assert "singd_core.Optimizer runs on NumPy arrays" in message
    files = [line for line in frames if line.lstrip().startswith("File ")]
    assert all("singd_cupy" in line or "<string>" in line for line in files), files
