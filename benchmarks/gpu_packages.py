"""The packages that `make gpu` needs and the machine lacks: from wheels, or from copies in others.

It imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


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
    """A folder with the array-api-compat that scikit-learn or SciPy has a copy of."""
    for name in ("sklearn.externals.array_api_compat", "scipy._lib.array_api_compat"):
        parent = find(name.partition(".")[0])
        copy = parent and parent.parent.joinpath(*name.split("."))
        if copy and copy.exists():
            folder.mkdir(parents=True)
            (folder / "array_api_compat").symlink_to(copy, target_is_directory=True)
            print(f"array-api-compat is not installed: {name} takes its place", flush=True)
            return [str(folder)]
    raise SystemExit("array-api-compat is not installed: put its wheel into a folder for --wheels")


def find(package: str) -> Path | None:
    """The folder of a package that is installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
