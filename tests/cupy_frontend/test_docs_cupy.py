"""The CuPy examples of docs/own_loop.md run on NumPy in its place, and every name is CuPy's."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import cupy
import numpy as np
import pytest

import singd_cupy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python no-run\n(.*?)```", PAGE, re.DOTALL)


class NumPyAsCuPy(types.ModuleType):
    """NumPy under the names that CuPy has, and no others."""

    def __init__(self, real, stand_in):
        super().__init__(real.__name__)
        self.real, self.stand_in = real, stand_in

    def __getattr__(self, name):
        real, found = getattr(self.real, name), getattr(self.stand_in, name)
        return NumPyAsCuPy(real, found) if isinstance(real, types.ModuleType) else found


def test_the_cupy_loop_runs_on_numpy_in_its_place(elsewhere, monkeypatch, tmp_path):
    from singd_core.state import flatten

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cupy.from_dlpack", np.from_dlpack)
    monkeypatch.setattr(singd_cupy, "flatten", flatten)
    monkeypatch.setitem(sys.modules, "cupy", NumPyAsCuPy(cupy, np))
    page = {}
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(block.replace('device="cuda"', 'device="cpu"'), page)
    assert len(page["losses"]) == 150
    assert page["weight"].sum().item() == 12.0  # torch sees what was added in place


def test_a_name_that_cupy_lacks_is_an_error():
    with pytest.raises(AttributeError):
        NumPyAsCuPy(cupy, np).busday_count  # noqa: B018 - NumPy has it


@pytest.mark.slow
def test_the_cupy_loop_is_typed(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(BLOCKS[:2]))  # the third is torch's too
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--allow-untyped-defs", "--allow-untyped-calls", str(tmp_path / "page.py")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "frontends")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": path}
    )
    assert done.returncode == 0, done.stdout
