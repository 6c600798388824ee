"""The demo on NumPy runs where no autograd framework is installed."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
CODE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "jax", "cupy"):
            raise ModuleNotFoundError(f"the demo imports {name}")
sys.meta_path.insert(0, Refuse())
folder = sys.argv[1]
sys.path.insert(0, folder)
sys.argv = ["demo_numpy.py", "--steps", "4", "--picture", "picture.png"]
runpy.run_path(folder + "/demo_numpy.py", run_name="__main__")
"""


def test_the_demo_on_numpy_needs_no_framework_and_shows_table_and_picture(tmp_path):
    command = [sys.executable, "-c", CODE, str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│ float" in line]
    assert sum("SINGD" in row for row in rows) == 10
    assert "nan" not in done.stdout.lower()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
