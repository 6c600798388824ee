"""The packages that `make gpu` needs and the machine lacks: from wheels, or from copies in others.

It imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

# The oldest array-api-compat that pyproject.toml admits: `clip` of older ones waits for a GPU.
LEAST = 1, 14


def unpacked(wheels: Path | None, folder: Path) -> list[str]:
    """Folders for PYTHONPATH that have what the interpreter lacks."""
    found = []
    if wheels is not None:
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            raise SystemExit(f"--wheels {wheels}: there is no wheel in it")
        install = "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"
        site = str(folder / "site")
        subprocess.run([sys.executable, *install, site, *files], check=True)
        found.append(site)
    if not (find("array_api_compat") or (found and Path(found[0], "array_api_compat").exists())):
        found += _vendored(folder / "vendored")
    return found


def _vendored(folder: Path) -> list[str]:
    """A folder with the newest array-api-compat that scikit-learn or SciPy has a copy of."""
    copies = []
    for name in ("sklearn.externals.array_api_compat", "scipy._lib.array_api_compat"):
        parent = find(name.partition(".")[0])
        copy = parent and parent.parent.joinpath(*name.split("."))
        if copy and copy.exists():
            copies.append((_version(copy), name, copy))
    if not copies:
        raise SystemExit(
            "array-api-compat is not installed: put its wheel into a folder for --wheels"
        )
    version, name, copy = max(copies)
    folder.mkdir(parents=True)
    (folder / "array_api_compat").symlink_to(copy, target_is_directory=True)
    print(f"array-api-compat is not installed: {name} takes its place", flush=True)
    if version < LEAST:
        print("This copy is old, and steps wait for the GPU: give a newer wheel by --wheels")
    return [str(folder)]


def _version(package: Path) -> tuple[int, ...]:
    """The version that the folder of a package names."""
    found = re.search(r'__version__ = "(\d+)\.(\d+)', (package / "__init__.py").read_text())
    return tuple(map(int, found.groups())) if found else ()


def find(package: str) -> Path | None:
    """The folder of a package that is installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
