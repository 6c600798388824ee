"""The demo on NumPy runs where no autograd framework is installed."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
CODE = """
import sys, runpy
sys.modules |= dict.fromkeys(["torch", "jax", "cupy"])  # importing one of them is an error
sys.path.insert(0, sys.argv[1])
sys.argv = ["demo_numpy.py", "--steps", "4", "--picture", "picture.png"]
runpy.run_path(sys.path[0] + "/demo_numpy.py", run_name="__main__")
"""


def test_the_demo_on_numpy_needs_no_framework_and_shows_table_and_picture(tmp_path):
    command = [sys.executable, "-c", CODE, str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "float32" in line or "float64" in line]
    assert sum("SINGD" in row and "│" in row for row in rows) == 10
    assert (tmp_path / "picture.png").stat().st_size > 10_000
